//! A folder of scanner files to NIfTI images: `afterimage volumes`.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::fs;
use std::io::Read;
use std::path::Path;

use serde_json::Value;
use system_tests::material::{phantom, short_folder};
use system_tests::program::run;

/// Sides of the simulated scanner's mosaic and volume.
const MOSAIC_BYTES: usize = 384 * 384 * 2;
const SIDES: [i16; 3] = [64, 64, 27];

fn unpacked(path: &Path) -> Vec<u8> {
    let packed = fs::read(path).unwrap();
    let mut plain = Vec::new();
    flate2::read::GzDecoder::new(packed.as_slice())
        .read_to_end(&mut plain)
        .unwrap();
    plain
}

/// The sum of 16-bit values.
fn sum(bytes: &[u8]) -> u64 {
    let (pairs, _) = bytes.as_chunks::<2>();
    pairs
        .iter()
        .map(|pair| u64::from(u16::from_le_bytes(*pair)))
        .sum()
}

/// The names in a folder.
fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_folder_becomes_one_image_and_what_is_odd_is_listed() {
    let files = &phantom().files;
    let dir = short_folder();
    let (input, out) = (dir.path().join("in"), dir.path().join("out"));
    fs::create_dir_all(input.join("deeper/still")).unwrap();
    // The third is missing, the fourth comes first, the fifth twice; one is cut, one is no DICOM.
    let put = |name: &str, bytes: &[u8]| fs::write(input.join(name), bytes).unwrap();
    let whole: Vec<Vec<u8>> = files[..6]
        .iter()
        .map(|file| fs::read(file).unwrap())
        .collect();
    put("a", &whole[3]);
    put("deeper/b", &whole[0]);
    put("deeper/still/c", &whole[1]);
    put("d", &whole[4]);
    put("e", &whole[4]);
    put("f", &whole[5][..whole[5].len() - 1]);
    put("ZZCANARY.txt", b"no scanner's file");
    // Another image with the fifth's number; and a link to the first, of which nothing is lost.
    let mut other = whole[4].clone();
    // A voxel of one of the middle slices.
    let pixels = other.len() - 384 * 384 * 2;
    other[pixels + 100_000] ^= 1;
    put("g", &other);
    std::os::unix::fs::symlink(input.join("deeper/b"), input.join("h")).unwrap();
    // An empty folder is as good as none.
    fs::create_dir(&out).unwrap();

    let ended = run("afterimage", &[&"volumes", &input, &"--out", &out]).succeeded();
    assert!(
        ended.stdout.contains("3 files are not used"),
        "{}",
        ended.stdout
    );
    assert!(
        ended
            .stdout
            .contains("another image of a volume that is there already"),
        "{}",
        ended.stdout
    );
    assert!(
        ended.stdout.contains("not a DICOM file"),
        "{}",
        ended.stdout
    );
    assert!(
        ended.stdout.contains("1 missing, 2 files twice"),
        "{}",
        ended.stdout
    );
    assert_eq!(names(&out), ["series001.json", "series001.nii.gz"]);
    assert_eq!(names(dir.path()), ["in", "out"], "nothing else is left");

    let note: Value =
        serde_json::from_slice(&fs::read(out.join("series001.json")).unwrap()).unwrap();
    assert_eq!(note["shape"], serde_json::json!([64, 64, 27, 4]));
    assert_eq!(note["RepetitionTime"], 1.5);
    assert_eq!(note["SliceTiming"].as_array().unwrap().len(), 27);
    assert_eq!(note["missing"], serde_json::json!([3]));
    let numbers: Vec<u64> = note["volumes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|volume| volume["number"].as_u64().unwrap())
        .collect();
    assert_eq!(numbers, [1, 2, 4, 5]);
    assert!(!note.to_string().contains("ZZ"));

    let image = unpacked(&out.join("series001.nii.gz"));
    let side = |axis: usize| i16::from_le_bytes([image[40 + 2 * axis], image[41 + 2 * axis]]);
    assert_eq!(
        [0, 1, 2, 3, 4].map(side),
        [4, SIDES[0], SIDES[1], SIDES[2], 4]
    );
    let volume_bytes = 64 * 64 * 27 * 2;
    assert_eq!(image.len(), 352 + 4 * volume_bytes);
    for (place, index) in [0, 1, 3, 4].into_iter().enumerate() {
        let stored = &whole[index][whole[index].len() - MOSAIC_BYTES..];
        let at = 352 + place * volume_bytes;
        assert_eq!(
            sum(&image[at..at + volume_bytes]),
            sum(stored),
            "volume {index}"
        );
    }
}

#[test]
fn nothing_is_written_where_nothing_can_be_read() {
    let dir = short_folder();
    let (input, out) = (dir.path().join("in"), dir.path().join("out"));
    fs::create_dir(&input).unwrap();
    fs::write(input.join("a.dcm"), b"no scanner's file").unwrap();
    run("afterimage", &[&"volumes", &input, &"--out", &out]).refused(1, &["no file below"]);
    assert_eq!(names(dir.path()), ["in"]);
    fs::create_dir(&out).unwrap();
    fs::write(out.join("series001.json"), b"of another day").unwrap();
    run("afterimage", &[&"volumes", &input, &"--out", &out]).refused(1, &["exists already"]);
    assert_eq!(names(&out), ["series001.json"]);
    run(
        "afterimage",
        &[&"volumes", &dir.path().join("gone"), &"--out", &"x"],
    )
    .refused(1, &["cannot be read"]);
}

/// The shared scanner data, where they are there.
#[test]
fn every_series_of_the_shared_data_is_read_and_no_patient_named() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/scanner/dicom");
    if !data.is_dir() {
        eprintln!("{} was not found, its test passes unseen", data.display());
        return;
    }
    let dir = short_folder();
    let out = dir.path().join("out");
    let ended = run("afterimage", &[&"volumes", &data, &"--out", &out]).succeeded();
    let said = format!("{}{}", ended.stdout, ended.stderr);
    assert!(!said.contains("ZZ"), "{said}");
    for (shape, volumes) in [
        ("64 x 64 x 8", 16),
        ("64 x 64 x 15", 3),
        ("64 x 64 x 9", 3),
        ("96 x 96 x 63", 2),
        ("64 x 64 x 33", 6),
        ("64 x 64 x 27", 6),
    ] {
        let line = format!("{shape}, {volumes} volumes");
        assert!(said.contains(&line), "{line}: {said}");
    }
    assert!(said.contains("Philips enhanced multi-frame"), "{said}");
    assert!(said.contains("JPEG 2000 lossless"), "{said}");
    for name in names(&out) {
        let path = out.join(&name);
        let bytes = if name.ends_with(".gz") {
            unpacked(&path)
        } else {
            fs::read(&path).unwrap()
        };
        let canary = b"ZZCANARY";
        assert!(
            !bytes.windows(canary.len()).any(|part| part == canary),
            "{name}"
        );
    }
}
