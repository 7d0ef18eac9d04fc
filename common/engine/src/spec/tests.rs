//! The grammar, line by line.

use super::*;

fn forward(s: &str) -> Result<ForwardSpec, SpecError> {
    s.parse()
}

fn channel(s: &str) -> Result<ChannelSpec, SpecError> {
    s.parse()
}

fn tcp(ip: &str, port: u16) -> Endpoint {
    let host = Host::Ip(ip.parse().unwrap());
    Endpoint::Tcp { host, port }
}

fn named(name: &str, port: u16) -> Endpoint {
    let host = Host::Name(name.into());
    Endpoint::Tcp { host, port }
}

fn unix(path: &str) -> Endpoint {
    Endpoint::Unix(path.into())
}

#[test]
fn forwards_parse_and_print_the_same() {
    let longest = format!("/{}", "p".repeat(MAX_UNIX_PATH - 1));
    let longest_line = format!("x:{longest}:-");
    let table = [
        ("http:127.0.0.1:9080", "http", tcp("127.0.0.1", 9080), None),
        ("http:0.0.0.0:0", "http", tcp("0.0.0.0", 0), None),
        ("ssh:localhost:22", "ssh", named("localhost", 22), None),
        (
            "ssh:a-b.example_c.org:65535:blue",
            "ssh",
            named("a-b.example_c.org", 65535),
            Some("blue"),
        ),
        ("h:[::1]:80", "h", tcp("::1", 80), None),
        ("h:[::]:0:v6", "h", tcp("::", 0), Some("v6")),
        (
            "h:[::ffff:10.0.0.1]:80",
            "h",
            tcp("::ffff:10.0.0.1", 80),
            None,
        ),
        (
            "h:[2001:db8::1]:8080:a.b_c-d",
            "h",
            tcp("2001:db8::1", 8080),
            Some("a.b_c-d"),
        ),
        ("db:/run/db.sock:-", "db", unix("/run/db.sock"), None),
        (
            "db:/run/db.sock:-:blue",
            "db",
            unix("/run/db.sock"),
            Some("blue"),
        ),
        ("db:sock:-", "db", unix("sock"), None),
        ("db:/run/a:80:-", "db", unix("/run/a:80"), None),
        ("db:/run/a:80:-:blue", "db", unix("/run/a:80"), Some("blue")),
        ("db:/run/a:-:-", "db", unix("/run/a:-"), None),
        ("db:/run/a:b:-", "db", unix("/run/a:b"), None),
        ("db:/run/with space:-", "db", unix("/run/with space"), None),
        (
            "http:10.0.0.1:80:90",
            "http",
            tcp("10.0.0.1", 80),
            Some("90"),
        ),
        ("http:[::1]:80:0", "http", tcp("::1", 80), Some("0")),
        ("db:/run/a:80:-:1", "db", unix("/run/a:80"), Some("1")),
        (
            "dns/udp:127.0.0.1:53",
            "dns/udp",
            tcp("127.0.0.1", 53),
            None,
        ),
        (
            "A.b_c-9/z:127.0.0.1:1",
            "A.b_c-9/z",
            tcp("127.0.0.1", 1),
            None,
        ),
        (&longest_line, "x", unix(&longest), None),
    ];
    for (line, service, endpoint, id) in table {
        let spec = forward(line).unwrap_or_else(|error| panic!("{line}: {error}"));
        assert_eq!(spec.service.as_str(), service, "{line}");
        assert_eq!(spec.endpoint, endpoint, "{line}");
        assert_eq!(spec.channel.as_deref(), id, "{line}");
        assert_eq!(spec.to_string(), line);
    }
}

#[test]
fn channels_parse_and_print_the_same() {
    use Method::*;
    let device = "/dev/virtio-ports/org.virtproxy.0";
    let table = [
        (
            "vhost-user:/run/vp.sock:-",
            VhostUser,
            "/run/vp.sock",
            None,
            None,
        ),
        (
            "vhost-user:vp.sock:-:blue",
            VhostUser,
            "vp.sock",
            None,
            Some("blue"),
        ),
        (
            "vhost-user:/run/a:b:1:-",
            VhostUser,
            "/run/a:b:1",
            None,
            None,
        ),
        (
            "virtserial-open:/dev/virtio-ports/org.virtproxy.0:-",
            VirtserialOpen,
            device,
            None,
            None,
        ),
        (
            "virtserial-open:org.virtproxy.0:-:vs",
            VirtserialOpen,
            "org.virtproxy.0",
            None,
            Some("vs"),
        ),
        (
            "isa-serial-open:/dev/ttyS1:115200",
            IsaSerialOpen,
            "/dev/ttyS1",
            Some(115_200),
            None,
        ),
        (
            "unix-connect:/tmp/a.sock:-:1",
            UnixConnect,
            "/tmp/a.sock",
            None,
            Some("1"),
        ),
        (
            "unix-listen:/tmp/a.sock:-",
            UnixListen,
            "/tmp/a.sock",
            None,
            None,
        ),
        (
            "tcp-connect:guest.example:9000",
            TcpConnect,
            "guest.example",
            Some(9000),
            None,
        ),
        (
            "tcp-listen:1.2.3.4:9000:1",
            TcpListen,
            "1.2.3.4",
            Some(9000),
            Some("1"),
        ),
        ("tcp-listen:[::]:0", TcpListen, "[::]", Some(0), None),
        (
            "vsock-connect:host:9000",
            VsockConnect,
            "host",
            Some(9000),
            None,
        ),
        (
            "vsock-connect:3:4000000000",
            VsockConnect,
            "3",
            Some(4_000_000_000),
            None,
        ),
        (
            "vsock-listen:any:9000:g",
            VsockListen,
            "any",
            Some(9000),
            Some("g"),
        ),
        (
            "hvsock-connect:/run/v.sock:9000",
            HvsockConnect,
            "/run/v.sock",
            Some(9000),
            None,
        ),
        ("stdio:-:-", Stdio, "-", None, None),
        (
            "exec:ssh box 'a:b' -c stdio:-:- -i x:127.0.0.1:80:-",
            Exec,
            "ssh box 'a:b' -c stdio:-:- -i x:127.0.0.1:80",
            None,
            None,
        ),
        ("exec:a:1:-:2", Exec, "a:1", None, Some("2")),
    ];
    for (line, method, addr, port, id) in table {
        let spec = channel(line).unwrap_or_else(|error| panic!("{line}: {error}"));
        assert_eq!(
            (spec.method, spec.addr.as_str(), spec.port),
            (method, addr, port),
            "{line}"
        );
        assert_eq!(spec.id.as_deref(), id, "{line}");
        assert_eq!(spec.to_string(), line);
    }
}

#[test]
fn each_wrong_forward_says_which_field_and_what_to_write() {
    use SpecError::*;
    let form = Form::Forward;
    let long_path = format!("x:/{}:-", "p".repeat(MAX_UNIX_PATH));
    let long_service = format!("{}:127.0.0.1:1", "s".repeat(256));
    let long_id = format!("x:127.0.0.1:1:{}", "i".repeat(65));
    let long_host = format!("x:{}:1", "h".repeat(254));
    let table = [
        ("", MissingService),
        (":127.0.0.1:80", MissingService),
        ("http", MissingAddr(form)),
        ("http:", MissingAddr(form)),
        ("http::80", MissingAddr(form)),
        ("http::-", MissingAddr(form)),
        ("http:127.0.0.1", MissingPort(form)),
        ("http:127.0.0.1:", MissingPort(form)),
        ("http:[::1]", MissingPort(form)),
        ("http:/run/x.sock", MissingPort(form)),
        ("http:/run/a:b/x.sock", MissingPort(form)),
        ("http:127.0.0.1:www", BadPort("www".into())),
        ("http:127.0.0.1:-1", BadPort("-1".into())),
        ("http:127.0.0.1:+80", BadPort("+80".into())),
        ("http:127.0.0.1:80 ", BadPort("80 ".into())),
        (
            "http:127.0.0.1:65536",
            LargePort {
                port: "65536".into(),
                max: 65535,
            },
        ),
        (
            "http:h:99999999999",
            LargePort {
                port: "99999999999".into(),
                max: 65535,
            },
        ),
        ("http:/run/x.sock:80", PortAfterPath("80".into())),
        ("http:127.0.0.1:-", NoNumber("127.0.0.1".into())),
        ("http:[::1]:-", NoNumber("[::1]".into())),
        ("http:::1:80", NoBrackets("::1".into())),
        ("http:fe80::1:80:90", NoBrackets("fe80::1:80".into())),
        ("http:10.0.0.1:-:1", NoNumber("10.0.0.1".into())),
        ("http:[::g]:80", BadIpv6("[::g]".into())),
        ("http:[127.0.0.1]:80", BadIpv6("[127.0.0.1]".into())),
        ("http:[::1:80", BadIpv6("[::1".into())),
        ("http:300.0.0.1:80", BadHost("300.0.0.1".into())),
        ("http:1.2.3:80", BadHost("1.2.3".into())),
        ("http:*:80", BadHost("*".into())),
        ("http:a b:80", BadHost("a b".into())),
        ("http:127.0.0.1:80:1st", BadId("1st".into())),
        ("http:127.0.0.1:80:a b", BadId("a b".into())),
        ("ht tp:127.0.0.1:80", BadService("ht tp".into())),
        ("hütte:127.0.0.1:80", BadService("hütte".into())),
        ("a\nb:127.0.0.1:80", BadService("a\nb".into())),
        (&long_path, LongPath(108)),
        (&long_service, LongService(256)),
        (&long_id, BadId("i".repeat(65))),
        (&long_host, BadHost("h".repeat(254))),
    ];
    for (line, error) in table {
        assert_eq!(forward(line), Err(error), "{line}");
        let message = forward(line).unwrap_err().to_string();
        assert!(
            !message.contains('\n') && message.contains(": "),
            "{message}"
        );
    }
}

#[test]
fn each_wrong_channel_says_which_field_and_what_to_write() {
    use SpecError::*;
    let form = Form::Channel;
    let long_path = format!("vhost-user:/{}:-", "p".repeat(MAX_UNIX_PATH));
    let table = [
        ("", UnknownMethod("".into())),
        ("vhost", UnknownMethod("vhost".into())),
        ("vhost:/run/vp.sock:-", UnknownMethod("vhost".into())),
        ("/run/vp.sock", UnknownMethod("/run/vp.sock".into())),
        ("vhost-user", MissingAddr(form)),
        ("vhost-user:", MissingAddr(form)),
        ("vhost-user::-", MissingAddr(form)),
        ("vhost-user:/run/vp.sock", MissingPort(form)),
        ("vhost-user:/run/vp.sock:80", PortAfterPath("80".into())),
        (
            "virtserial-open:org.virtproxy.0:9",
            PortAfterPath("9".into()),
        ),
        ("vhost-user:/run/vp.sock:blue", BadPort("blue".into())),
        ("vhost-user:/run/vp.sock:-:-x", BadId("-x".into())),
        ("isa-serial-open:/dev/ttyS1:-", NoSpeed),
        ("unix-connect:/run/a.sock:80", PortAfterPath("80".into())),
        ("unix-listen:/run/a:1:2", PortAfterPath("1".into())),
        ("tcp-connect:127.0.0.1:0", TargetPortZero),
        ("tcp-connect:127.0.0.1:-", NoNumber("127.0.0.1".into())),
        (
            "tcp-listen:127.0.0.1:65536",
            LargePort {
                port: "65536".into(),
                max: 65535,
            },
        ),
        ("tcp-listen:::1:9000", NoBrackets("::1".into())),
        ("tcp-listen:300.1.1.1:9000", BadHost("300.1.1.1".into())),
        ("vsock-connect:guest:9000", BadCid("guest".into())),
        ("vsock-listen:any:-", NoVsockPort),
        ("hvsock-connect:/run/v.sock:-", NoVsockPort),
        ("stdio:x:-", NotNothing),
        ("stdio:-:1", NotNothing),
        ("exec:true:1", PortAfterPath("1".into())),
        (&long_path, LongPath(108)),
    ];
    for (line, error) in table {
        assert_eq!(channel(line), Err(error), "{line}");
        let message = channel(line).unwrap_err().to_string();
        assert!(
            !message.contains('\n') && message.contains(": "),
            "{message}"
        );
    }
}

#[test]
fn messages_read_well() {
    assert_eq!(
        forward("http:127.0.0.1").unwrap_err().to_string(),
        "missing PORT: write SERVICE:ADDR:PORT, or SERVICE:/path:- for a UNIX socket"
    );
    assert_eq!(
        channel("isa:/dev/ttyS1:1").unwrap_err().to_string(),
        "unknown METHOD \"isa\": the methods are vhost-user, virtserial-open, isa-serial-open, unix-connect, \
         unix-listen, tcp-connect, tcp-listen, vsock-connect, vsock-listen, hvsock-connect, stdio, exec"
    );
}

#[test]
fn only_a_listener_may_leave_the_port_to_the_kernel() {
    assert!(ForwardSpec::parse_listen("http:127.0.0.1:0").is_ok());
    assert_eq!(
        ForwardSpec::parse_target("http:127.0.0.1:0"),
        Err(SpecError::TargetPortZero)
    );
    assert!(ForwardSpec::parse_target("http:127.0.0.1:80").is_ok());
    assert!(ForwardSpec::parse_target("http:/run/x:-").is_ok());
}

#[test]
fn every_method_has_one_row() {
    for row in METHODS {
        assert_eq!(row.method.name(), row.name);
        assert_eq!(row.name.parse(), Ok(row.method));
    }
}

#[test]
fn clap_puts_flag_and_value_before_the_message() {
    let error = clap::Command::new("virtproxy")
        .arg(
            clap::Arg::new("o")
                .short('o')
                .value_parser(clap::value_parser!(ForwardSpec)),
        )
        .arg(
            clap::Arg::new("i")
                .short('i')
                .value_parser(ForwardSpec::parse_target),
        )
        .try_get_matches_from(["virtproxy", "-o", "http:127.0.0.1"])
        .unwrap_err()
        .to_string();
    let line = error.lines().next().unwrap();
    assert!(
        line.starts_with("error: invalid value 'http:127.0.0.1' for '-o"),
        "{line}"
    );
    assert!(line.contains("missing PORT: write"), "{line}");
}

/// Glues fields from a small alphabet together in every way: what parses must print as it was written,
/// but for spellings of one address, and then parse to the same value.
#[test]
fn whatever_parses_survives_the_round_trip() {
    let pieces = [
        "",
        "a",
        "-",
        "80",
        "007",
        "/p",
        "[::1]",
        "[0:0::1]",
        "127.0.0.1",
        "::",
        "x.y",
    ];
    let mut parsed = 0;
    for a in pieces {
        for b in pieces {
            for c in pieces {
                for d in pieces {
                    let line = format!("s:{a}:{b}:{c}:{d}");
                    let short = format!("s:{a}:{b}");
                    for line in [line, short] {
                        let Ok(spec) = forward(&line) else { continue };
                        assert_eq!(forward(&spec.to_string()).as_ref(), Ok(&spec), "{line}");
                        parsed += 1;
                    }
                    let line = format!("vhost-user:{a}:{b}:{c}:{d}");
                    if let Ok(spec) = channel(&line) {
                        assert_eq!(spec.to_string(), line);
                    }
                }
            }
        }
    }
    assert!(parsed > 100, "only {parsed} lines parsed");
}
