//! Files of 20 GB, all but a little of them a hole: looking at them takes no time.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::file;
use crate::write::safetensors_raw;

const LARGE: u64 = 20 << 30;

#[test]
fn a_safetensors_file_of_20_gb_is_inspected_within_a_second() {
    let dir = tempfile::tempdir().unwrap();
    let header = format!(
        r#"{{"w":{{"dtype":"F16","shape":[{},1024],"data_offsets":[0,{LARGE}]}}}}"#,
        LARGE / 2048
    );
    let path = file(&dir, "large.safetensors", &safetensors_raw(&header, &[]));
    let begin = std::fs::metadata(&path).unwrap().len();
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(begin + LARGE)
        .unwrap();
    inspect_quickly(&path);
}

/// An archive beyond 4 GiB, its numbers a hole in the file.
#[test]
fn a_zip_file_of_20_gb_is_inspected_within_a_second() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("large.pth");
    let mut out = File::create(&path).unwrap();
    // The number of elements does not fit four bytes: LONG1 of eight.
    let mut pickle = b"\x80\x02}(X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nHalfStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu".to_vec();
    let long = |out: &mut Vec<u8>, value: u64| {
        out.extend([0x8a, 8]);
        out.extend(value.to_le_bytes());
    };
    long(&mut pickle, LARGE / 2);
    pickle.extend(b"tQK\x00(");
    long(&mut pickle, LARGE / 2048);
    pickle.extend(b"M\x00\x04t(M\x00\x04K\x01t\x89}tRu.");
    let crc = |bytes: &[u8]| {
        let mut crc = flate2::Crc::new();
        crc.update(bytes);
        crc.sum()
    };
    let mut directory = Vec::new();
    let mut count = 0_u64;
    let entries: [(&str, &[u8], u64); 2] = [
        ("archive/data.pkl", &pickle, pickle.len() as u64),
        ("archive/data/0", &[], LARGE),
    ];
    for (name, bytes, len) in entries {
        let begin = out.stream_position().unwrap();
        let mut sizes = 1_u16.to_le_bytes().to_vec();
        sizes.extend(16_u16.to_le_bytes());
        sizes.extend(len.to_le_bytes());
        sizes.extend(len.to_le_bytes());
        let mut fixed = vec![45, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        fixed.extend(crc(bytes).to_le_bytes());
        fixed.extend([0xff; 8]);
        fixed.extend(u16::try_from(name.len()).unwrap().to_le_bytes());
        let mut local = b"PK\x03\x04".to_vec();
        local.extend(&fixed);
        local.extend(20_u16.to_le_bytes());
        local.extend(name.as_bytes());
        local.extend(&sizes);
        out.write_all(&local).unwrap();
        out.write_all(bytes).unwrap();
        let hole = i64::try_from(len - bytes.len() as u64).unwrap();
        out.seek(SeekFrom::Current(hole)).unwrap();
        directory.extend(b"PK\x01\x02\x2d\x00");
        directory.extend(&fixed);
        directory.extend(20_u16.to_le_bytes());
        directory.extend([0; 10]);
        directory.extend(u32::try_from(begin).unwrap().to_le_bytes());
        directory.extend(name.as_bytes());
        directory.extend(&sizes);
        count += 1;
    }
    let begin = out.stream_position().unwrap();
    let end = begin + directory.len() as u64;
    directory.extend(b"PK\x06\x06");
    directory.extend(44_u64.to_le_bytes());
    directory.extend([45, 0, 45, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    for number in [count, count, end - begin, begin] {
        directory.extend(number.to_le_bytes());
    }
    directory.extend(b"PK\x06\x07\x00\x00\x00\x00");
    directory.extend(end.to_le_bytes());
    directory.extend(1_u32.to_le_bytes());
    directory.extend(b"PK\x05\x06\x00\x00\x00\x00\x02\x00\x02\x00");
    directory.extend([0xff; 8]);
    directory.extend([0, 0]);
    out.write_all(&directory).unwrap();
    drop(out);
    inspect_quickly(&path);
}

fn inspect_quickly(path: &std::path::Path) {
    let start = Instant::now();
    let output = Command::new(env!("CARGO_BIN_EXE_afterimage-export"))
        .arg("inspect")
        .arg(path)
        .output()
        .unwrap();
    let took = start.elapsed();
    let shown = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(shown.contains(&format!("{LARGE} bytes")), "{shown}");
    assert!(took < Duration::from_secs(1), "took {took:?}");
}
