//! The host's program by the first version's name.

use std::os::unix::fs::symlink;
use std::process::Command;

#[test]
fn usage_and_flags_are_those_of_the_first_version() {
    let old = std::env::temp_dir().join(format!("virtproxy-old-{}", std::process::id()));
    std::fs::create_dir_all(&old).unwrap();
    let program = old.join("qemu-vp");
    symlink(env!("CARGO_BIN_EXE_virtproxy"), &program).unwrap();
    let help = Command::new(&program).arg("-h").output().unwrap().stdout;
    let help = String::from_utf8(help).unwrap();
    for part in [
        "Usage: qemu-vp ",
        "--channel",
        "--oforward",
        "--iforward",
        "--verbose",
        "--version",
    ] {
        assert!(help.contains(part), "{part} is not in\n{help}");
    }
    std::fs::remove_dir_all(old).unwrap();
}
