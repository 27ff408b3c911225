//! Small files that would take much memory or time.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::damage::pickled;
use crate::file;

/// Pickles that ask for more memory or time than they are worth.
fn bombs() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let mut laughs = b"\x80\x02}X\x01\x00\x00\x00x(".to_vec();
    // Every list holds the one before it ten times.
    laughs.extend(b"]q\x00");
    for level in 1..16_u8 {
        laughs.extend(b"](");
        for _ in 0..10 {
            laughs.extend([b'h', level - 1]);
        }
        laughs.extend([b'e', b'q', level]);
    }
    // The lists below the last one go, with their mark.
    laughs.extend(b"1h\x0fs.");
    let mut names = b"\x80\x02}X\x01\x00\x00\x00x".to_vec();
    names.extend(b"X\xe8\x03\x00\x00");
    names.extend(std::iter::repeat_n(b'k', 1000));
    names.extend(b"q\x000");
    names.extend(b"}(");
    for _ in 0..2 {
        names.extend(b"h\x00}(h\x00h\x00u");
    }
    names.extend(b"us.");
    let mut key = b"\x80\x02}X\xd0\x07\x00\x00".to_vec();
    key.extend(std::iter::repeat_n(b'k', 2000));
    key.extend(b"Ns.");
    let repeated = |step: &[u8]| {
        let mut bytes = b"\x80\x02".to_vec();
        bytes.extend(step.repeat(6_000_000));
        bytes.extend(b"0}.");
        bytes
    };
    let mut doubled = b"\x80\x02N".to_vec();
    doubled.extend(std::iter::repeat_n(b'2', 6_000_000));
    let mut deep = b"\x80\x02".to_vec();
    deep.extend(std::iter::repeat_n(b']', 1_000_000));
    deep.extend(std::iter::repeat_n(b'a', 999_999));
    deep.push(b'.');
    let mut tuples = b"\x80\x02)".to_vec();
    tuples.extend(std::iter::repeat_n(0x85, 3_000_000));
    tuples.push(b'.');
    vec![
        ("laughs", laughs, "places that could hold a tensor"),
        ("names", names, "names of at most 1024 bytes"),
        ("key", key, "keys of at most 1024 bytes"),
        ("values", repeated(b"N"), "more than 4000000 values"),
        ("marks", repeated(b"("), "more than 4000000 values"),
        ("texts", repeated(b"U\x01a"), "more than 4000000 values"),
        ("doubled", doubled, "more than 4000000 values"),
        ("deep", deep, "expected a dictionary at the top"),
        ("tuples", tuples, "expected a dictionary at the top"),
    ]
}

#[test]
fn bombs_are_refused_in_little_memory_and_time() {
    let dir = tempfile::tempdir().unwrap();
    for (name, pickle, expected) in bombs() {
        let path = file(&dir, name, &pickled(pickle));
        let start = Instant::now();
        // The shell's limit is in KiB of address space: 640 MiB.
        let output = Command::new("sh")
            .arg("-c")
            .arg("ulimit -v 655360; exec \"$0\" inspect \"$1\"")
            .arg(env!("CARGO_BIN_EXE_afterimage-export"))
            .arg(&path)
            .output()
            .unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{name}: {message}");
        assert!(message.contains(expected), "{name}: {message}");
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "{name} took {:?}",
            start.elapsed()
        );
    }
}
