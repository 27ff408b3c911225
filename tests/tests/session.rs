//! A session on a real scanner's base, from DICOM files to betas, and no patient's name anywhere.
//!
//! The data is `shared/scanner/session` beside the workspace; its README says how it was made.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::fs;
use std::path::{Path, PathBuf};

use system_tests::daemon::Daemon;
use system_tests::material::signed;
use system_tests::numbers;
use system_tests::one_at_a_time;
use system_tests::scanner::{Scanner, files_of, name_of};
use system_tests::site::Site;

/// Trials of the session.
const TRIALS: u32 = 20;
/// Mean over trials of the pattern correlation that a real pipeline should reach with AR(1) noise; the best
/// tools of the field reach 0.70.
const LEAST_CORRELATION: f64 = 0.688;
/// The same with OLS.
const LEAST_CORRELATION_OLS: f64 = 0.665;
/// What stands in the headers where a patient's name stood.
const CANARY: &str = "ZZ";

/// Every file below a folder.
fn below(dir: &Path) -> Vec<PathBuf> {
    let (mut found, mut folders) = (Vec::new(), vec![dir.to_path_buf()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path.clone());
            }
            found.push(path);
        }
    }
    found
}

fn holds(bytes: &[u8], word: &str) -> bool {
    bytes
        .windows(word.len())
        .any(|part| part == word.as_bytes())
}

/// The session's folder; says where it is not there.
#[expect(
    clippy::print_stdout,
    reason = "a test says in one line what was not found"
)]
fn session_data() -> Option<PathBuf> {
    let shared =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/scanner/session/e11_120tr");
    if !shared.is_dir() {
        println!("{} was not found, nothing is tested", shared.display());
        return None;
    }
    Some(shared)
}

/// A site of the session's subject, and its unpacked files.
fn prepared(shared: &Path) -> (Site, Vec<PathBuf>) {
    let site = Site::new(
        signed(),
        &shared.join("mask.nii.gz"),
        &shared.join("events.tsv"),
    );
    for part in ["dicom_part1.tar.zst", "dicom_part2.tar.zst"] {
        let packed = fs::File::open(shared.join(part)).unwrap();
        let unpacked = zstd::Decoder::new(packed).unwrap();
        tar::Archive::new(unpacked).unpack(site.dir()).unwrap();
    }
    let files = files_of(&site.dir().join("dicom"));
    assert_eq!(files.len(), 120);
    (site, files)
}

/// Mean over trials of the pattern correlation of what is on record with the truth.
fn correlation(site: &Site, shared: &Path) -> f64 {
    let found = numbers::read(&site.session().join("runs/001/fast-betas.npy"));
    let truth = numbers::read(&shared.join("true_betas.npy"));
    numbers::mean_correlation(&found, &truth, 0)
}

#[test]
fn a_real_session_is_recovered_with_white_noise_assumed() {
    let _turn = one_at_a_time();
    let Some(shared) = session_data() else { return };
    let (site, files) = prepared(&shared);
    site.change("[task]", "[task]\nnoise = \"ols\"");
    let mut daemon = Daemon::start(&site);
    Scanner::new(&site.scanner_folder()).send_all(&files);
    daemon.wait_for_trials(TRIALS);
    daemon.stop();
    let correlation = correlation(&site, &shared);
    println!("real session, OLS: betas and truth correlate by {correlation:.3}");
    assert!(correlation >= LEAST_CORRELATION_OLS, "{correlation}");
}

#[test]
fn a_real_session_is_recovered_and_names_no_patient() {
    let _turn = one_at_a_time();
    let Some(shared) = session_data() else { return };
    let (site, files) = prepared(&shared);
    let first = fs::read(&files[0]).unwrap();
    assert!(holds(&first, "ZZCANARY"), "the files carry no canary");

    let mut daemon = Daemon::start(&site);
    let mut scanner = Scanner::new(&site.scanner_folder());
    let (before, after) = files.split_at(60);
    scanner.send_all(before);
    // A broken file whose name and header both carry a name.
    scanner.send_as(&first[..first.len() / 2], "ZZCANARY^PATIENT.MR.0007.IMA");
    scanner.send_as(&first[..40_000], "ZZPHYS.dcm");
    scanner.send_all(after);
    daemon.wait_for_trials(TRIALS);
    daemon.wait_for_notes(TRIALS);

    let board = daemon.get("/api/trials");
    let faults = daemon.faults();
    daemon.check(
        faults.len() == 2,
        &format!("two broken files, yet {faults:?}"),
    );
    let bedside = [
        daemon.get("/bedside").body,
        daemon.events("\n\n").into_bytes(),
    ];
    daemon.stop();

    let session = site.session();
    let correlation = correlation(&site, &shared);
    println!("real session, AR(1): betas and truth correlate by {correlation:.3}");
    assert!(correlation >= LEAST_CORRELATION, "{correlation}");

    assert!(!holds(&board.body, CANARY), "{}", board.text());
    assert!(!bedside.iter().any(|page| holds(page, CANARY)));
    assert!(!daemon.log().contains(CANARY), "the log names a patient");
    let recorded = below(&site.state());
    let kept = |path: &PathBuf| path.extension().is_some_and(|end| end == "bin");
    let quarantine = session.join("quarantine");
    for path in &recorded {
        let place = path.strip_prefix(site.state()).unwrap().to_str().unwrap();
        assert!(!place.contains(CANARY), "{place}");
        // The copies in quarantine are the scanner's own bytes; pictures and numbers may hold any
        // two bytes, so of them the longer canaries are looked for.
        if path.is_dir() || (path.starts_with(&quarantine) && kept(path)) {
            continue;
        }
        let bytes = fs::read(path).unwrap();
        let text = std::str::from_utf8(&bytes).is_ok();
        let canaries = if text {
            &[CANARY][..]
        } else {
            &["ZZCANARY", "ZZPHYS", "ZZOPER"]
        };
        for canary in canaries {
            assert!(!holds(&bytes, canary), "{place} holds {canary}");
        }
    }
    assert_eq!(
        recorded
            .iter()
            .filter(|path| path.parent() == Some(&quarantine))
            .count(),
        4
    );
    assert!(recorded.iter().any(|path| name_of(path) == "session.json"));
}
