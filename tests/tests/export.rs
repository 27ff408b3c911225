//! Checkpoints to a bundle, the bundle to pictures: the exporter and `afterimage reconstruct`.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use ndarray::Array2;
use system_tests::material::{self, Keys, kept_folder, short_folder};
use system_tests::numbers::{self, some_betas};
use system_tests::program::{Ended, run};

/// Voxels of the two subjects: two widths, so that one's ridge never passes for the other's.
const VOXELS: [usize; 2] = [300, 257];
const SIGNATURE: &str = "manifest.json.minisig";
/// Exit code of the exporter, and of wrong betas.
const FAULT: i32 = 1;
/// Exit code of `afterimage` for what no other try will mend.
const SETTING: i32 = 78;

/// One set of checkpoints, exported in both precisions.
struct Exported {
    checkpoints: PathBuf,
    fp32: PathBuf,
    fp16: PathBuf,
    keys: Keys,
    strangers: Keys,
}

fn exported() -> &'static Exported {
    static MADE: OnceLock<Exported> = OnceLock::new();
    MADE.get_or_init(|| {
        let dir = kept_folder().join("exported");
        let made = Exported {
            checkpoints: dir.join("checkpoints"),
            fp32: dir.join("fp32"),
            fp16: dir.join("fp16"),
            keys: {
                fs::create_dir_all(&dir).unwrap();
                material::keygen(&dir, "site")
            },
            strangers: material::keygen(&dir, "stranger"),
        };
        material::synth(&made.checkpoints, &format!("{},{}", VOXELS[0], VOXELS[1]));
        for (precision, bundle) in [("fp32", &made.fp32), ("fp16", &made.fp16)] {
            material::export(&made.checkpoints, precision, bundle);
            material::sign(bundle, &made.keys);
        }
        made
    })
}

/// Every file below a folder, by its path in it.
fn contents(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![dir.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let place = path.strip_prefix(dir).unwrap().to_path_buf();
                found.insert(place, fs::read(&path).unwrap());
            }
        }
    }
    found
}

fn copy(from: &Path, to: &Path) {
    for (place, bytes) in contents(from) {
        let path = to.join(place);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

fn verify(bundle: &Path, keys: &Keys) -> Ended {
    run(
        "afterimage-export",
        &[&"verify", &"--bundle", &bundle, &"--public", &keys.public],
    )
}

/// `afterimage reconstruct` with the fast sampler, and more arguments.
fn reconstruct(bundle: &Path, betas: &Path, out: &Path, more: &[&str]) -> Ended {
    let mut arguments: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![
        &"reconstruct",
        &"--bundle",
        &bundle,
        &"--betas",
        &betas,
        &"--out",
        &out,
    ];
    if !more.contains(&"--fidelity") {
        arguments.extend_from_slice(&[&"--fidelity", &"edge"]);
    }
    for argument in more {
        arguments.push(argument);
    }
    run("afterimage", &arguments)
}

/// The pictures of a folder, by name.
fn pictures(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = contents(dir);
    found.retain(|path, _| path.extension().is_some_and(|end| end == "png"));
    found
}

/// The compressed pixels of a PNG file, without the texts beside them.
fn pixels(png: &[u8]) -> Vec<u8> {
    assert!(png.starts_with(b"\x89PNG\r\n\x1a\n"));
    let (mut rest, mut pixels) = (&png[8..], Vec::new());
    while let Some((head, tail)) = rest.split_at_checked(8) {
        let len = u32::from_be_bytes(head[..4].try_into().unwrap());
        let (data, after) = tail.split_at(usize::try_from(len).unwrap());
        if &head[4..] == b"IDAT" {
            pixels.extend_from_slice(data);
        }
        rest = &after[4..];
    }
    assert!(!pixels.is_empty());
    pixels
}

#[test]
fn an_export_run_twice_gives_the_same_bytes() {
    let made = exported();
    let dir = short_folder();
    for (precision, first) in [("fp32", &made.fp32), ("fp16", &made.fp16)] {
        let again = dir.path().join(precision);
        material::export(&made.checkpoints, precision, &again);
        let (mut first, again) = (contents(first), contents(&again));
        assert!(first.remove(Path::new(SIGNATURE)).is_some());
        assert!(first == again, "{precision}");
        let names: Vec<String> = again
            .keys()
            .map(|path| path.display().to_string())
            .collect();
        assert!(
            names.iter().any(|name| name == "manifest.json"),
            "{names:?}"
        );
    }
}

#[test]
fn half_precision_takes_about_half_the_room() {
    let made = exported();
    let len = |bundle: &Path| -> usize {
        let files = contents(bundle);
        files.values().map(Vec::len).sum()
    };
    let (fp32, fp16) = (len(&made.fp32), len(&made.fp16));
    println!("tiny bundle: fp32 {fp32} bytes, fp16 {fp16} bytes");
    assert!(fp16 * 10 < fp32 * 7);
}

#[test]
fn an_existing_bundle_is_not_written_over() {
    let made = exported();
    let before = contents(&made.fp32);
    let ended = run(
        "afterimage-export",
        &[
            &"bundle",
            &"--folder",
            &made.checkpoints,
            &"--precision",
            &"fp16",
            &"--out",
            &made.fp32,
        ],
    );
    ended.refused(FAULT, &[made.fp32.to_str().unwrap()]);
    assert!(before == contents(&made.fp32));
}

#[test]
fn keys_are_never_written_over_and_the_secret_is_ours_alone() {
    use std::os::unix::fs::PermissionsExt;
    let dir = short_folder();
    let keys = material::keygen(dir.path(), "k");
    let before = contents(dir.path());
    let mode = fs::metadata(&keys.secret).unwrap().permissions().mode();
    assert_eq!(mode & 0o077, 0, "{mode:o}");
    let again = run(
        "afterimage-export",
        &[
            &"keygen",
            &"--secret",
            &keys.secret,
            &"--public",
            &keys.public,
        ],
    );
    assert_eq!(again.code(), Some(FAULT), "{again:?}");
    assert_eq!(before, contents(dir.path()));
}

#[test]
fn a_signed_bundle_verifies_with_its_key_and_no_other() {
    let made = exported();
    for bundle in [&made.fp32, &made.fp16] {
        verify(bundle, &made.keys).succeeded();
        verify(bundle, &made.strangers).refused(FAULT, &[SIGNATURE]);
    }
}

#[test]
fn an_unsigned_bundle_does_not_verify() {
    let made = exported();
    let dir = short_folder();
    copy(&made.fp16, dir.path());
    fs::remove_file(dir.path().join(SIGNATURE)).unwrap();
    verify(dir.path(), &made.keys).refused(FAULT, &[SIGNATURE, "not signed"]);
}

#[test]
fn a_changed_byte_in_any_file_does_not_verify() {
    let made = exported();
    let dir = short_folder();
    copy(&made.fp16, dir.path());
    let signature = dir.path().join(SIGNATURE);
    for (place, bytes) in contents(dir.path()) {
        if place == Path::new(SIGNATURE) {
            continue;
        }
        for at in [0, bytes.len() / 2, bytes.len() - 1] {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            fs::write(dir.path().join(&place), changed).unwrap();
            let ended = verify(dir.path(), &made.keys);
            assert_eq!(
                ended.code(),
                Some(FAULT),
                "byte {at} of {place:?}: {ended:?}"
            );
            // A manifest that still can be read is betrayed by its signature.
            let named = place.file_name().unwrap().to_str().unwrap();
            assert!(ended.stderr.contains(named), "{}", ended.stderr);
        }
        fs::write(dir.path().join(&place), &bytes[..bytes.len() - 1]).unwrap();
        assert_eq!(
            verify(dir.path(), &made.keys).code(),
            Some(FAULT),
            "{place:?}"
        );
        fs::write(dir.path().join(&place), bytes).unwrap();
    }
    // Of the signature, the lines that are signatures and the comment that is signed; a first line
    // and a last line end mean nothing.
    let text = fs::read_to_string(&signature).unwrap();
    for line in text.lines().skip(1) {
        let at = text.find(line).unwrap() + line.len() / 2;
        let mut changed = text.clone().into_bytes();
        changed[at] ^= 1;
        fs::write(&signature, changed).unwrap();
        verify(dir.path(), &made.keys).refused(FAULT, &[SIGNATURE]);
    }
    fs::write(&signature, text).unwrap();
    verify(dir.path(), &made.keys).succeeded();
}

#[test]
fn an_added_missing_or_linked_file_does_not_verify() {
    let made = exported();
    let dir = short_folder();
    let bundle = dir.path().join("bundle");
    copy(&made.fp16, &bundle);
    for added in ["graphs/more.onnx", "more.bin", "weights/.hidden"] {
        fs::write(bundle.join(added), "more").unwrap();
        verify(&bundle, &made.keys).refused(FAULT, &[added, "not a file listed"]);
        fs::remove_file(bundle.join(added)).unwrap();
    }
    let graph = contents(&bundle)
        .into_keys()
        .find(|place| place.extension().is_some_and(|end| end == "onnx"))
        .unwrap();
    let aside = dir.path().join("aside");
    fs::rename(bundle.join(&graph), &aside).unwrap();
    verify(&bundle, &made.keys).refused(FAULT, &[graph.to_str().unwrap()]);
    std::os::unix::fs::symlink(&aside, bundle.join(&graph)).unwrap();
    verify(&bundle, &made.keys).refused(FAULT, &[graph.to_str().unwrap()]);
    fs::remove_file(bundle.join(&graph)).unwrap();
    fs::rename(&aside, bundle.join(&graph)).unwrap();
    verify(&bundle, &made.keys).succeeded();
}

#[test]
fn betas_become_the_same_pictures_every_time_and_others_with_another_seed() {
    let made = exported();
    let dir = short_folder();
    let betas = dir.path().join("x.npy");
    numbers::write(&betas, &some_betas(2, VOXELS[0]));
    let key = made.keys.public.to_str().unwrap();
    for bundle in [&made.fp32, &made.fp16] {
        let make = |name: &str, seed: &str| {
            let out = dir.path().join(name);
            let more = ["--key", key, "--seed", seed];
            let ended = reconstruct(bundle, &betas, &out, &more).succeeded();
            assert!(ended.stdout.contains("the weights are random"), "{ended:?}");
            let made = pictures(&out);
            fs::remove_dir_all(out).unwrap();
            made
        };
        let (first, again, other) = (make("a", "1"), make("b", "1"), make("c", "2"));
        assert_eq!(
            first.len(),
            4,
            "blurry and unrefined of two trials: {:?}",
            first.keys()
        );
        assert!(first == again);
        for trial in ["trial001-unrefined.png", "trial002-unrefined.png"] {
            let of = |made: &BTreeMap<PathBuf, Vec<u8>>| pixels(&made[Path::new(trial)]);
            assert_ne!(of(&first), of(&other), "{trial}");
        }
        let trial = |number: u32| &first[Path::new(&format!("trial{number:03}-unrefined.png"))];
        assert_ne!(pixels(trial(1)), pixels(trial(2)));
    }
}

#[test]
fn both_fidelities_and_both_subjects_work() {
    let made = exported();
    let dir = short_folder();
    for (subject, voxels) in VOXELS.into_iter().enumerate() {
        let betas = dir.path().join("x.npy");
        numbers::write(&betas, &some_betas(1, voxels));
        let subject = format!("subj{:02}", subject + 1);
        for fidelity in ["edge", "reference"] {
            let out = dir.path().join(format!("{subject}-{fidelity}"));
            let more = ["--subject", &subject, "--fidelity", fidelity];
            let ended = reconstruct(&made.fp32, &betas, &out, &more).succeeded();
            assert!(ended.stderr.contains("signature is not checked"));
            let note = fs::read_to_string(out.join("trial001.json")).unwrap();
            assert!(note.contains(&format!("\"{fidelity}\"")), "{note}");
            assert!(note.contains(&format!("\"{subject}\"")), "{note}");
            assert!(!pictures(&out).is_empty());
        }
    }
}

#[test]
fn betas_that_do_not_fit_are_refused_with_what_was_expected() {
    let made = exported();
    let dir = short_folder();
    let betas = dir.path().join("x.npy");
    let out = dir.path().join("out");
    let refused = |words: &[&str]| {
        reconstruct(&made.fp32, &betas, &out, &[]).refused(FAULT, words);
        let left = if out.exists() {
            pictures(&out).len()
        } else {
            0
        };
        assert_eq!(left, 0, "a refused trial leaves no picture");
    };

    numbers::write(&betas, &some_betas(1, VOXELS[0] - 1));
    refused(&["expected betas of 300 voxels", "found 299"]);

    let mut values = some_betas(1, VOXELS[0]);
    values[[0, 41]] = f32::NAN;
    numbers::write(&betas, &values);
    refused(&["trial 1", "NaN", "41"]);
    values[[0, 41]] = f32::INFINITY;
    numbers::write(&betas, &values);
    refused(&["trial 1", "inf", "41"]);

    ndarray_npy::write_npy(&betas, &Array2::<i64>::zeros((1, VOXELS[0]))).unwrap();
    refused(&["x.npy", "float32 or float64"]);
    fs::write(&betas, b"no array").unwrap();
    refused(&["x.npy"]);
    fs::remove_file(&betas).unwrap();
    refused(&["x.npy"]);
}

#[test]
fn a_bundle_that_cannot_be_trusted_is_not_decoded() {
    let made = exported();
    let dir = short_folder();
    let betas = dir.path().join("x.npy");
    numbers::write(&betas, &some_betas(1, VOXELS[0]));
    let out = dir.path().join("out");
    let stranger = made.strangers.public.to_str().unwrap();
    reconstruct(&made.fp32, &betas, &out, &["--key", stranger]).refused(SETTING, &[SIGNATURE]);

    let bundle = dir.path().join("bundle");
    copy(&made.fp32, &bundle);
    let weights = contents(&bundle)
        .into_keys()
        .find(|place| place.extension().is_some_and(|end| end == "bin"))
        .unwrap();
    let mut bytes = fs::read(bundle.join(&weights)).unwrap();
    bytes[17] ^= 4;
    fs::write(bundle.join(&weights), bytes).unwrap();
    let key = made.keys.public.to_str().unwrap();
    for more in [&[][..], &["--key", key]] {
        reconstruct(&bundle, &betas, &out, more).refused(SETTING, &[weights.to_str().unwrap()]);
    }
    assert!(!out.exists());
}
