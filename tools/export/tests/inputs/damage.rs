//! Damage of each kind that a container can have; every message says what was expected and found.

use export::checkpoint::{Checkpoint, TensorDType, inspect};
use zip::CompressionMethod;

use crate::write::{Py, Saved, archive, dict, global, safetensors, safetensors_raw, size, text};
use crate::{file, refused, root, unreadable};

/// Two tensors in two storages.
fn saved() -> Saved {
    Saved::tensors(&[
        ("a", TensorDType::F32, &[2, 2], vec![1.0, 2.0, 3.0, 4.0]),
        ("b", TensorDType::F16, &[3], vec![5.0, 6.0, 7.0]),
    ])
}

/// Where the directory's record of an entry begins.
fn record(zip: &[u8], name: &str) -> usize {
    let ends = |at: &usize| zip[at + 46..].starts_with(name.as_bytes());
    (0..zip.len() - 46)
        .filter(|&at| zip[at..].starts_with(b"PK\x01\x02"))
        .find(ends)
        .unwrap()
}

fn expect(path: &std::path::Path, expected: &[&str]) {
    let message = refused(path);
    for expected in expected {
        assert!(message.contains(expected), "{expected}\n{message}");
    }
}

#[test]
fn everything_wrong_with_an_archives_directory_is_in_one_report() {
    let dir = tempfile::tempdir().unwrap();
    let mut zip = saved().zip();
    let (order, first, second) = (
        record(&zip, "archive/byteorder"),
        record(&zip, "archive/data/0"),
        record(&zip, "archive/data/1"),
    );
    // Another method, sizes that differ, sizes beyond the file, a password.
    zip[order + 10] = 12;
    zip[first + 24] ^= 1;
    zip[second + 20..second + 28].fill(0x7f);
    let version = record(&zip, "archive/version");
    zip[version + 8] |= 1;
    expect(
        &file(&dir, "a.pth", &zip),
        &[
            "archive/byteorder: expected a stored or deflated entry",
            "archive/data/0: expected the same length twice for a stored entry, found 17 and 16",
            "archive/data/1: expected 2139062143 bytes at byte",
            "archive/version: expected an entry in the clear",
        ],
    );
}

#[test]
fn entries_that_share_bytes_or_a_name_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut zip = saved().zip();
    let (first, second) = (
        record(&zip, "archive/data/0"),
        record(&zip, "archive/data/1"),
    );
    zip.copy_within(first + 42..first + 46, second + 42);
    expect(
        &file(&dir, "a.pth", &zip),
        &["archive/data/0: expected to begin behind archive/data/1, which ends at byte"],
    );
    let mut zip = saved().zip();
    for at in 0..zip.len() {
        if zip[at..].starts_with(b"archive/data/1") {
            zip[at + 13] = b'0';
        }
    }
    expect(
        &file(&dir, "b.pth", &zip),
        &["expected each entry once, found a name twice"],
    );
}

#[test]
fn an_archive_needs_one_pickle() {
    let dir = tempfile::tempdir().unwrap();
    let pickle = saved().pickle(false);
    let entry = |name: &str| (name.to_owned(), pickle.clone());
    for (entries, found) in [
        (vec![entry("archive/other.pkl")], "found 0"),
        (vec![entry("a/data.pkl"), entry("b/data.pkl")], "found 2"),
        (vec![entry("a/b/data.pkl")], "found 0"),
    ] {
        let path = file(&dir, "a.pth", &archive(&entries, CompressionMethod::Stored));
        expect(&path, &["data.pkl: expected one in the archive", found]);
    }
}

#[test]
fn compressed_entries_that_lie_about_their_length_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let numbers: Vec<f64> = (0..4000).map(|n| f64::from(n % 3)).collect();
    let saved = Saved::tensors(&[("a", TensorDType::F32, &[4000], numbers)]);
    let whole = saved.zip_of(CompressionMethod::Deflated, "little");
    let at = record(&whole, "archive/data/0");
    // The directory says 16000; the numbers of the pickle follow it.
    for (claimed, found) in [(12_000_u32, "more"), (20_000, "16000")] {
        let mut lying = Saved::tensors(&[("a", TensorDType::F32, &[1], vec![0.0])]);
        lying.storages[0].bytes = vec![0; claimed as usize];
        let mut entries = vec![("archive/data.pkl".to_owned(), lying.pickle(false))];
        entries.push(("archive/data/0".into(), saved.storages[0].bytes.clone()));
        let mut zip = archive(&entries, CompressionMethod::Deflated);
        let record = record(&zip, "archive/data/0");
        zip[record + 24..record + 28].copy_from_slice(&claimed.to_le_bytes());
        let path = file(&dir, "a.pth", &zip);
        let message = unreadable(&path);
        let expected = format!("archive/data/0: expected {claimed} bytes, found {found}");
        assert!(message.contains(&expected), "{message}");
    }
    // Bytes that are no compressed numbers at all.
    let mut zip = whole.clone();
    let begin = u32::from_le_bytes(whole[at + 42..at + 46].try_into().unwrap()) as usize;
    zip[begin + 60..begin + 70].fill(0xff);
    let message = unreadable(&file(&dir, "b.pth", &zip));
    assert!(message.contains("archive/data/0: expected"), "{message}");
}

#[test]
fn a_changed_number_is_found_by_its_checksum() {
    let dir = tempfile::tempdir().unwrap();
    let mut zip = saved().zip();
    let at = zip
        .windows(8)
        .position(|w| w == [0, 0, 0x80, 0x3f, 0, 0, 0, 0x40])
        .unwrap();
    zip[at] = 1;
    let message = unreadable(&file(&dir, "a.pth", &zip));
    assert!(
        message.contains("archive/data/0: expected CRC-32"),
        "{message}"
    );
}

#[test]
fn tensors_that_do_not_fit_their_storages_are_all_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut saved = saved();
    let Py::Dict(items) = &mut saved.value else {
        unreachable!("a dictionary was made")
    };
    for (name, tensor) in [
        ("reach", Py::Tensor(0, 1, vec![2, 2], vec![2, 1])),
        ("many", Py::Tensor(0, 0, vec![1 << 40], vec![0])),
        (
            "overflow",
            Py::Tensor(0, 0, vec![i64::MAX, i64::MAX], vec![0, 0]),
        ),
        ("stride", Py::Tensor(0, 0, vec![2, 1], vec![i64::MAX, 1])),
        (
            "nothing",
            Py::Tensor(0, 0, vec![0, i64::MAX, 4], vec![1, 1, 1]),
        ),
        ("a", Py::Tensor(0, 0, vec![4], vec![1])),
    ] {
        items.push((text(name), tensor));
    }
    for (name, bytes) in [("a.pth", saved.zip()), ("b.pth", saved.legacy())] {
        let path = file(&dir, name, &bytes);
        expect(
            &path,
            &[
                "5 tensors cannot be read",
                "reach: expected a view within 4 elements, found shape [2, 2], strides [2, 1], offset 1",
                "many: expected a view within 4 elements",
                "overflow: expected a view within 4 elements",
                "stride: expected a view within 4 elements",
                "a: expected each key once, found it twice",
            ],
        );
    }
    let mut missing = crate::damage::saved();
    missing.storages[1].bytes.clear();
    let entries = vec![(
        "archive/data.pkl".to_owned(),
        crate::damage::saved().pickle(false),
    )];
    let path = file(&dir, "c.pth", &archive(&entries, CompressionMethod::Stored));
    expect(
        &path,
        &[
            "a: expected its numbers in storage 0, which is missing",
            "b: expected its numbers in storage 1",
        ],
    );
    let mut entries = entries;
    for (at, stored) in missing.storages.iter().enumerate() {
        entries.push((format!("archive/data/{at}"), stored.bytes.clone()));
    }
    let path = file(&dir, "d.pth", &archive(&entries, CompressionMethod::Stored));
    expect(
        &path,
        &["b: expected 3 elements of 2 bytes in archive/data/1, found 0 bytes"],
    );
}

#[test]
fn a_tensor_without_numbers_is_read_whatever_its_other_axes_are() {
    let dir = tempfile::tempdir().unwrap();
    let huge: &[i64] = &[0, i64::MAX, 4];
    let path = file(
        &dir,
        "a.safetensors",
        &safetensors(&[("e", TensorDType::F32, huge, vec![])]),
    );
    assert!(root(&Checkpoint::open(&path).unwrap())["e"].is_empty());
    let mut saved = saved();
    saved.value = dict([("e", Py::Tensor(0, 0, huge.to_vec(), vec![i64::MAX, 4, 1]))]);
    let path = file(&dir, "b.pth", &saved.zip());
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert!(inspect::render(&checkpoint).contains("(top): 1 tensors, 0 elements"));
    assert!(root(&checkpoint)["e"].is_empty());
}

/// A zip checkpoint with this pickle.
pub(crate) fn pickled(pickle: Vec<u8>) -> Vec<u8> {
    archive(
        &[("archive/data.pkl".to_owned(), pickle)],
        CompressionMethod::Deflated,
    )
}

#[test]
fn pickles_that_no_checkpoint_needs_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let one = |value: Py| Saved {
        value: dict([("x", value)]),
        ..saved()
    };
    let long = Py::Call(
        Box::new(global("torch", "Size")),
        vec![Py::Tuple(vec![Py::Int(1); 17])],
    );
    let getattr = |name: &str| {
        Py::Call(
            Box::new(global("builtins", "getattr")),
            vec![global("torch", "Size"), text(name)],
        )
    };
    for (value, expected) in [
        (
            Py::Tensor(0, 0, vec![-1], vec![1]),
            "expected a length of at least 0",
        ),
        (
            Py::Tensor(0, -1, vec![1], vec![1]),
            "expected a length of at least 0",
        ),
        (
            Py::Tensor(0, 0, vec![1], vec![-1]),
            "expected a length of at least 0",
        ),
        (
            Py::Tensor(0, 0, vec![1; 17], vec![1; 17]),
            "expected a tuple of at most 16 lengths",
        ),
        (
            Py::Tensor(0, 0, vec![1], vec![1, 1]),
            "expected as many strides as axes",
        ),
        (
            long,
            "expected a tuple of at most 16 lengths for torch.Size",
        ),
        (
            Py::Call(Box::new(global("torch", "Size")), vec![Py::Int(1)]),
            "for torch.Size",
        ),
        (
            Py::Call(Box::new(text("x")), vec![]),
            "a value that is no function",
        ),
        (
            Py::Call(Box::new(global("torch", "FloatStorage")), vec![]),
            "the pickle calls Storage",
        ),
        (
            getattr("__class__"),
            "the pickle calls getattr on something else",
        ),
        (global("torch", "load"), "asks for torch.load"),
        (global("builtins", "eval"), "asks for builtins.eval"),
        (
            global("deepspeed.runtime.zero.config", "DeepSpeedZeroConfig"),
            "asks for deepspeed",
        ),
    ] {
        let saved = one(value);
        expect(
            &file(&dir, "a.pth", &saved.zip()),
            &["data.pkl is refused", expected],
        );
        expect(
            &file(&dir, "b.pth", &saved.legacy()),
            &["pickle of the contents is refused", expected],
        );
    }
    for (bytes, expected) in [
        (b"\x80\x02".to_vec(), "the pickle ends early"),
        (b"\x80\x09.".to_vec(), "expected pickle protocol 2 to 5"),
        (b"\x80\x02\xff.".to_vec(), "unknown pickle opcode 0xff"),
        (b"\x80\x02.".to_vec(), "expected a value on the stack"),
        (b"\x80\x02t.".to_vec(), "expected a mark on the stack"),
        (b"\x80\x02(N.".to_vec(), "expected a dictionary at the top"),
        (
            b"\x80\x02}(Nu.".to_vec(),
            "expected keys and values in pairs",
        ),
        (b"\x80\x02}Na.".to_vec(), "expected a list on the stack"),
        (
            b"\x80\x02h\x07.".to_vec(),
            "expected a value that was stored before",
        ),
        (b"\x80\x02NQ.".to_vec(), "expected a storage reference"),
        (
            b"\x80\x02X\xff\xff\xff\xffab".to_vec(),
            "the pickle ends early",
        ),
        (
            b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\xffab".to_vec(),
            "the pickle ends early",
        ),
        (b"\x80\x02].".to_vec(), "expected a dictionary at the top"),
    ] {
        expect(&file(&dir, "c.pth", &pickled(bytes)), &[expected]);
    }
}

#[test]
fn legacy_files_that_break_their_rules_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let whole = saved().legacy();
    expect(
        &file(&dir, "a.pth", &saved().legacy_of(1002, true)),
        &["protocol: expected 1001, found Int(1002)"],
    );
    let mut magic = whole.clone();
    magic[4] ^= 1;
    expect(&file(&dir, "b.pth", &magic), &["a bare pickle: refused"]);
    // The last storage is one element of two bytes shorter than the file says.
    expect(
        &file(&dir, "c.pth", &whole[..whole.len() - 2]),
        &["storage 1: expected 6 bytes at byte", "found 4"],
    );
    let counts = whole.len() - 6 - 8;
    let mut huge = whole.clone();
    huge[counts..counts + 8].fill(0xff);
    expect(
        &file(&dir, "d.pth", &huge),
        &["storage 1: expected 18446744073709551615 bytes"],
    );
    let mut fewer = whole.clone();
    fewer[counts] = 2;
    expect(
        &file(&dir, "e.pth", &fewer),
        &["b: expected 3 elements of 2 bytes in storage 1, found 4 bytes"],
    );
    // The list of storages names one twice, then one that no tensor has.
    let list = whole
        .windows(7)
        .rposition(|w| w == b"X\x01\x00\x00\x001e")
        .unwrap();
    let mut twice = whole.clone();
    twice[list + 5] = b'0';
    expect(
        &file(&dir, "f.pth", &twice),
        &["storage 0: expected once in the list of storages, found twice"],
    );
    let mut unknown = whole;
    unknown[list + 5] = b'7';
    expect(
        &file(&dir, "g.pth", &unknown),
        &["storage 7: expected a tensor that uses it, found none"],
    );
}

#[test]
fn safetensors_that_break_their_rules_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let one = r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;
    let axes = "1,".repeat(16) + "1";
    let deep = "[".repeat(100_000);
    for (header, len, expected) in [
        (
            format!(r#"{{"a":{one},"a":{one}}}"#),
            8,
            "a: expected each name once, found it twice",
        ),
        (
            format!(r#"{{"a":{one}}}"#),
            9,
            "expected the file to end at byte",
        ),
        (
            format!(r#"{{"a":{one}}}"#),
            7,
            "a: expected data_offsets within 0..=7, found 0..8",
        ),
        (
            format!(r#"{{"a":{one},"b":{{"dtype":"U8","shape":[1],"data_offsets":[9,10]}}}}"#),
            10,
            "b: expected to begin at byte",
        ),
        (
            format!(r#"{{"a":{one},"b":{{"dtype":"U8","shape":[1],"data_offsets":[7,8]}}}}"#),
            8,
            "found an overlap at byte",
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#.into(),
            8,
            "found 8..0",
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}"#.into(),
            8,
            "a: expected dtype, shape and data_offsets",
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}"#.into(),
            8,
            "a: expected dtype, shape and data_offsets",
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,9]}}"#.into(),
            8,
            "a: expected dtype, shape and data_offsets",
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1}}"#.into(),
            8,
            "unknown field `x`",
        ),
        (
            r#"{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,8]}}"#.into(),
            8,
            "found \"F4\"",
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[18446744073709551615,2],"data_offsets":[0,8]}}"#.into(),
            8,
            "expected countless bytes",
        ),
        (
            format!(r#"{{"a":{{"dtype":"U8","shape":[{axes}],"data_offsets":[0,1]}}}}"#),
            1,
            "at most 16 lengths",
        ),
        (
            format!(r#"{{"a":{one},"__metadata__":{{"x":1}}}}"#),
            8,
            "__metadata__: expected texts by name",
        ),
        (
            format!(r#"{{"a":{deep}"#),
            8,
            "expected a JSON object, found: EOF",
        ),
        (
            format!(r#"{{"a":{one}"#),
            8,
            "expected a JSON object, found: EOF",
        ),
        (format!(r#"{{"a":{one}}} x"#), 8, "trailing characters"),
    ] {
        let bytes = safetensors_raw(&header, &vec![0; len]);
        expect(
            &file(&dir, "a.safetensors", &bytes),
            &[expected, "the safetensors header is wrong"],
        );
    }
    let mut long = safetensors_raw("{}", &[]);
    long[7] = 0x7f;
    expect(
        &file(&dir, "b.safetensors", &long),
        &["expected a header of at most 2 bytes"],
    );
    expect(
        &file(&dir, "c.safetensors", &long[..6]),
        &["found something else"],
    );
    let both = r#"{"a":{"dtype":"F9","shape":[],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,3]}}"#;
    expect(
        &file(&dir, "d.safetensors", &safetensors_raw(both, &[0; 8])),
        &["a: expected a known dtype", "b: expected 4 bytes"],
    );
}

#[test]
fn shapes_of_a_zero_folder_are_plain_lists_too() {
    // Some versions save the shapes as lists; both are read alike.
    let saved = Saved {
        value: dict([("a", size(&[2])), ("b", Py::List(vec![Py::Int(2)]))]),
        storages: Vec::new(),
    };
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(&file(&dir, "a.pth", &saved.zip())).unwrap();
    assert_eq!(checkpoint.top_keys(), ["a", "b"]);
    assert_eq!(checkpoint.sections().count(), 0);
}

#[test]
fn checkpoints_that_cannot_be_opened_are_all_named() {
    let dir = tempfile::tempdir().unwrap();
    file(&dir, "a.pth", b"");
    file(&dir, "b.ckpt", b"<html>");
    let text =
        "precision = \"fp32\"\n[sources]\nmindeye = \"a.pth\"\nunclip = \"b.ckpt\"\nsdxl = \"c\"\n";
    let out = dir.path().join("out");
    let error = export::export::export(&crate::recipe(dir.path(), text), &out, &mut |_| {});
    let message = export::section::chain(&error.unwrap_err());
    for expected in [
        "3 checkpoints cannot be opened",
        "a.pth: expected a PyTorch zip or legacy checkpoint or a safetensors file, found an empty file",
        "b.ckpt: expected a PyTorch zip or legacy checkpoint or a safetensors file, found an HTML page",
        "/c: cannot read the file: No such file",
    ] {
        assert!(message.contains(expected), "{expected}\n{message}");
    }
    assert!(!out.exists());
}
