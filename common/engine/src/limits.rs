//! What the user may allow the other end, and this one, to use at most: the flags of the quotas.
//!
//! Each quota is enforced in one place: how many streams, and the bytes held for them, by the session, as what it grants;
//! connects and rates by the driver (`driver/quota.rs`). docs/limits.md is the reference.

use std::time::Duration;

use clap::Args;
use virtproxy_mux::Config;
use virtproxy_mux::session::{MAX_WINDOW, MIN_WINDOW};

use crate::program::seconds;

/// Under which the flags stand in `--help`.
pub const HEADING: &str = "Limits";

const MAX_STREAMS: u32 = 16 * 1024;
const MAX_CONNECTING: u32 = 1024;
const MAX_OPEN_RATE: u32 = 10_000;
const MAX_RESET_RATE: u32 = 5_000;
const MAX_BUFFER: &str = "256M";
const STALL_AFTER: &str = "30";

/// The quotas, for each channel.
#[derive(Args, Clone, Debug)]
pub struct Limits {
    /// Streams at once, each way; further clients are refused
    #[arg(long, value_name = "N", help_heading = HEADING, default_value_t = MAX_STREAMS)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub max_streams: u32,

    /// Targets of -i that are being connected to at once; further streams are refused
    #[arg(long, value_name = "N", help_heading = HEADING, default_value_t = MAX_CONNECTING)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub max_connecting: u32,

    /// Streams that the other end may open in a second; further ones are refused; 0 is no limit
    #[arg(long, value_name = "N", help_heading = HEADING, default_value_t = MAX_OPEN_RATE)]
    pub max_open_rate: u32,

    /// Streams of its own that the other end may reset in a second; beyond it can open none for a while; 0 is no limit
    #[arg(long, value_name = "N", help_heading = HEADING, default_value_t = MAX_RESET_RATE)]
    pub max_reset_rate: u32,

    /// Bytes held for a local socket that does not read, such as 256K; the other end then sends no more [default: 1M, or 4M
    /// from a device's guest]
    #[arg(long, value_name = "BYTES", help_heading = HEADING, value_parser = window)]
    pub max_stream_buffer: Option<u32>,

    /// The same over all streams of a channel, which is a VM's; streams then get less each
    #[arg(long, value_name = "BYTES", help_heading = HEADING, default_value = MAX_BUFFER, value_parser = bytes)]
    pub max_buffer: u64,

    /// Seconds after which what has work and makes no progress is told of, with what it waits for; 0 is never
    #[arg(long, value_name = "SECONDS", help_heading = HEADING, default_value = STALL_AFTER, value_parser = seconds)]
    pub stall_after: Duration,
}

impl Default for Limits {
    /// What holds without flags.
    fn default() -> Self {
        Limits {
            max_streams: MAX_STREAMS,
            max_connecting: MAX_CONNECTING,
            max_open_rate: MAX_OPEN_RATE,
            max_reset_rate: MAX_RESET_RATE,
            max_stream_buffer: None,
            max_buffer: Config::default().memory,
            stall_after: Duration::from_secs(30),
        }
    }
}

impl Limits {
    /// What a session is to be given.
    ///
    /// # Errors
    /// Limits that contradict each other, and the cure.
    pub fn session(&self) -> Result<Config, String> {
        let config = Config {
            max_streams: self.max_streams,
            memory: self.max_buffer,
            ..Config::default()
        };
        let least = config.set_aside();
        if least > self.max_buffer {
            let streams = self.max_buffer / u64::from(2 * MIN_WINDOW);
            return Err(format!(
                "--max-buffer {}: {} streams each way need {least} bytes: allow so many, or use --max-streams {}",
                self.max_buffer,
                self.max_streams,
                streams.max(1)
            ));
        }
        Ok(config)
    }

    /// What a stream's window may grow to, where `usual` would do and the channel asks for `wanted`.
    pub(crate) fn stream_window(&self, usual: u32, wanted: u32) -> u32 {
        self.max_stream_buffer.unwrap_or(usual.max(wanted))
    }
}

fn bytes(value: &str) -> Result<u64, String> {
    let (digits, unit) = match value.strip_suffix(['K', 'M', 'G']) {
        Some(digits) if value.ends_with('K') => (digits, 1 << 10),
        Some(digits) if value.ends_with('M') => (digits, 1 << 20),
        Some(digits) => (digits, 1 << 30),
        None => (value, 1),
    };
    let bytes = digits.parse::<u32>().ok();
    bytes.map(|bytes| u64::from(bytes) * unit).ok_or_else(|| {
        format!("{value:?} is not a number of bytes: write one like 65536, 64K or 1M")
    })
}

fn window(value: &str) -> Result<u32, String> {
    u32::try_from(bytes(value)?)
        .ok()
        .filter(|bytes| (MIN_WINDOW..=MAX_WINDOW).contains(bytes))
        .ok_or_else(|| format!("{value} is not within 4K to 1G"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        limits: Limits,
    }

    fn parse(flags: &[&str]) -> Result<Limits, String> {
        Flags::try_parse_from([&["test"], flags].concat())
            .map(|flags| flags.limits)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn no_flags_are_the_defaults() {
        let (parsed, default) = (parse(&[]).unwrap(), Limits::default());
        assert_eq!(format!("{parsed:?}"), format!("{default:?}"));
        default.session().unwrap();
    }

    #[test]
    fn sizes_have_units_and_bounds() {
        let limits = parse(&["--max-stream-buffer", "64K", "--max-buffer", "1G"]).unwrap();
        assert_eq!(limits.max_stream_buffer, Some(65536));
        assert_eq!(limits.max_buffer, 1 << 30);
        for (flag, value, part) in [
            ("--max-stream-buffer", "1K", "not within 4K to 1G"),
            ("--max-stream-buffer", "8G", "not within 4K to 1G"),
            ("--max-buffer", "1.5M", "not a number of bytes"),
            ("--max-buffer", "M", "not a number of bytes"),
            ("--max-streams", "0", "not in 1..=1048576"),
            ("--max-connecting", "0", "not in 1.."),
        ] {
            let error = parse(&[flag, value]).unwrap_err();
            assert!(error.contains(part), "{flag} {value}: {error}");
        }
    }

    #[test]
    fn memory_that_the_streams_do_not_fit_in_is_told_of_with_the_cure() {
        let error = parse(&["--max-buffer", "16M"]).unwrap().session();
        assert!(error.unwrap_err().contains("use --max-streams 2048"));
        let cured = parse(&["--max-buffer", "16M", "--max-streams", "2048"]).unwrap();
        cured.session().unwrap();
    }
}
