//! SSH keys made on the spot: one for the guest's server, one for whoever logs in.
//!
//! They never leave the cache and open nothing but the lab's guests. The host key is the same for every guest, so
//! `known_hosts` can be written beforehand and nobody is asked whether to trust a key.

use crate::cache::{self, Cache, write_whole};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The name under which `known_hosts` lists the guest's key.
pub const HOST_ALIAS: &str = "virtproxy-guest";

/// The key files.
#[derive(Debug, Clone)]
pub struct Keys {
    /// The user's private key; the public one stands beside it with `.pub`.
    pub user: PathBuf,
    /// The server's private key.
    pub host: PathBuf,
    /// For `ssh -F`: all that a client needs to know, and nothing of the user's own settings.
    pub ssh_config: PathBuf,
}

impl Keys {
    pub(crate) fn prepare(cache: &Cache, ssh_keygen: &Path) -> Result<Self> {
        let dir = cache.dir("keys")?;
        cache::sweep(&dir)?;
        let [user, host] = ["id_ed25519", "host_ed25519"].map(|name| dir.join(name));
        for key in [&user, &host] {
            if !key.is_file() || !public(key).is_file() {
                generate(ssh_keygen, key)?;
            }
        }
        let known_hosts = dir.join("known_hosts");
        let public_key =
            fs::read_to_string(public(&host)).context("cannot read the public host key")?;
        write_whole(
            &known_hosts,
            format!("{HOST_ALIAS} {public_key}").as_bytes(),
            0o644,
        )?;
        let ssh_config = dir.join("ssh_config");
        let text = format!(
            "IdentityFile {}\nUserKnownHostsFile {}\nHostKeyAlias {HOST_ALIAS}\nIdentitiesOnly yes\n\
             IdentityAgent none\nBatchMode yes\nStrictHostKeyChecking yes\nLogLevel ERROR\n",
            user.display(),
            known_hosts.display()
        );
        write_whole(&ssh_config, text.as_bytes(), 0o644)?;
        Ok(Self {
            user,
            host,
            ssh_config,
        })
    }

    /// The user's public key.
    pub(crate) fn user_public(&self) -> PathBuf {
        public(&self.user)
    }
}

fn public(key: &Path) -> PathBuf {
    key.with_extension("pub")
}

fn generate(ssh_keygen: &Path, key: &Path) -> Result<()> {
    let temporary = cache::beside(key);
    let output = Command::new(ssh_keygen)
        .args(["-q", "-t", "ed25519", "-N", "", "-C", "virtproxy-lab", "-f"])
        .arg(&temporary)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", ssh_keygen.display()))?;
    if !output.status.success() {
        bail!(
            "{} made no key: {}",
            ssh_keygen.display(),
            crate::apt::last_lines(&output.stderr, 4)
        );
    }
    let mut made = temporary.clone().into_os_string();
    made.push(".pub");
    fs::rename(&made, public(key)).context("cannot rename the public key")?;
    fs::rename(&temporary, key).context("cannot rename the private key")
}
