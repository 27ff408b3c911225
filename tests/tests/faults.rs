//! What goes wrong on a real day: dying processes, broken files, wrong settings, lost volumes.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use system_tests::daemon::{Daemon, PATIENCE};
use system_tests::material::{self, TRIALS, phantom, short_folder, signed};
use system_tests::one_at_a_time;
use system_tests::scanner::{Scanner, name_of};
use system_tests::site::Site;

/// Exit code of settings that no other try will mend.
const SETTING: i32 = 78;
/// How long roles may outlive their supervisor.
const GONE_WITHIN: Duration = Duration::from_secs(5);

fn alive(pid: i32) -> bool {
    kill(Pid::from_raw(pid), None::<Signal>).is_ok()
}

/// Volumes that the newest start of the daemon and those before it say are in.
fn volumes_in(daemon: &Daemon<'_>) -> usize {
    daemon.log().matches("volume in").count()
}

/// A run in whose middle a role is killed: every trial still gets its picture.
fn survives_the_death_of(role: &str) {
    let _turn = one_at_a_time();
    let site = Site::of_phantom(signed(), phantom());
    let mut daemon = Daemon::start(&site);
    let mut scanner = Scanner::new(&site.scanner_folder());
    let (before, after) = phantom().files.split_at(30);
    scanner.send_all(before);
    let old = daemon.kill_role(role);
    scanner.send_all(after);
    daemon.wait_for_trials(TRIALS);
    let new = daemon.wait(&format!("another {role}"), |daemon| daemon.role(role));
    daemon.check(new != old && !alive(old), "it was not killed");
    daemon.wait_until_up();
    daemon.wait_for_notes(TRIALS);
    let faults = daemon.faults();
    daemon.check(
        faults.is_empty(),
        &format!("nothing was lost, yet {faults:?}"),
    );
    // A volume may be on record and not yet in the log when its process dies.
    assert!(volumes_in(&daemon) + 1 >= phantom().files.len());
    daemon.stop();
}

#[test]
fn a_run_survives_the_death_of_acquire() {
    survives_the_death_of("acquire");
}

#[test]
fn a_run_survives_the_death_of_decode() {
    survives_the_death_of("decode");
}

#[test]
fn a_run_survives_the_death_of_show() {
    survives_the_death_of("show");
}

#[test]
fn a_run_survives_the_death_of_the_parser() {
    survives_the_death_of("parse");
}

/// A file put aside: its copy and the note beside it.
fn put_aside(site: &Site) -> Vec<(Vec<u8>, Value)> {
    let copies: Vec<PathBuf> = fs::read_dir(site.session().join("quarantine"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|end| end == "bin"))
        .collect();
    let read = |copy: &PathBuf| {
        let note = fs::read(copy.with_extension("json")).unwrap();
        (
            fs::read(copy).unwrap(),
            serde_json::from_slice(&note).unwrap(),
        )
    };
    copies.iter().map(read).collect()
}

#[test]
fn files_that_cannot_be_used_are_named_and_kept_and_the_run_goes_on() {
    let _turn = one_at_a_time();
    let site = Site::of_phantom(signed(), phantom());
    let mut daemon = Daemon::start(&site);
    let mut scanner = Scanner::new(&site.scanner_folder());
    let files = &phantom().files;
    let random: Vec<u8> = (0..60_000_u32)
        .map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0])
        .collect();
    let whole = fs::read(&files[29]).unwrap();
    let truncated = whole[..whole.len() / 2].to_vec();

    scanner.send_all(&files[..20]);
    scanner.send_as(&random, "001_000900.dcm");
    scanner.send_as(b"", "001_000901.dcm");
    scanner.send_all(&files[20..29]);
    // This volume never comes whole.
    scanner.send_as(&truncated, name_of(&files[29]));
    // The last number of a name tells volumes apart, and is all that is sure to be shown.
    let named = ["000900.dcm", "000901.dcm", "000030.dcm"];
    daemon.wait("each file to be named", |daemon| {
        let faults = daemon.faults();
        let fault = |name: &&str| faults.iter().any(|fault| fault.contains(*name));
        named.iter().all(fault).then_some(())
    });
    scanner.send_all(&files[30..]);
    daemon.wait_for_trials(TRIALS);

    let aside = put_aside(&site);
    let mut kept: Vec<&[u8]> = aside.iter().map(|(bytes, _)| &bytes[..]).collect();
    kept.sort_by_key(|bytes| bytes.len());
    assert!(
        kept == [b"", &random[..], &truncated],
        "other bytes were kept"
    );
    for (bytes, note) in &aside {
        assert_eq!(note["len_bytes"], bytes.len());
        let reason = note["reason"].as_str().unwrap();
        println!("put aside: {reason}");
        let told = daemon
            .faults()
            .into_iter()
            .any(|fault| fault.contains(reason));
        daemon.check(told, &format!("{reason:?} was not told"));
    }
    assert_eq!(daemon.faults().len(), named.len());
    assert_eq!(volumes_in(&daemon), files.len() - 1);
    daemon.stop();
}

/// The end of a daemon whose settings are wrong.
#[track_caller]
fn refused(site: &Site, words: &[&str]) {
    let mut daemon = Daemon::spawn(site);
    let status = daemon.ended(PATIENCE);
    let log = daemon.log();
    assert_eq!(status.code(), Some(SETTING), "{log}");
    for word in words {
        assert!(log.contains(word), "expected {word:?} in\n{log}");
    }
    assert!(!log.contains("panicked"), "{log}");
}

#[test]
fn settings_that_cannot_work_are_refused_by_name() {
    let _turn = one_at_a_time();
    let wrong = [
        (
            "tr_ms = 1500",
            "tr_ms = 15",
            &["scanner.tr_ms = 15 ", "300..=5000"][..],
        ),
        ("tr_ms = 1500", "tr_sm = 1500", &["site.toml", "tr_sm"]),
        (
            "tr_ms = 1500",
            "tr_ms = \"soon\"",
            &["site.toml", "tr_ms", "soon"],
        ),
        ("tr_ms = 1500", "tr_ms = ", &["site.toml", "line 10"]),
        (
            "folder = \"in\"",
            "folder = \"inn\"",
            &["scanner.folder", "inn"],
        ),
        ("seed = 7", "label_2 = 7", &["site.toml", "label_2"]),
        (
            "listen = \"127.0.0.1:",
            "listen = \"0.0.0.0:",
            &["web.listen", "loopback"],
        ),
        (
            "[subject]",
            "[subject]\nid = \"subj09\"",
            &["subject.id", "subj09", "subj01"],
        ),
        ("[paths]", "board = \"toaster\"\n[paths]", &["toaster.toml"]),
    ];
    for (from, to, words) in wrong {
        let site = Site::of_phantom(signed(), phantom());
        site.change(from, to);
        refused(&site, words);
    }
}

#[test]
fn a_settings_file_that_is_not_there_is_named() {
    let ended = system_tests::program::run("afterimage", &[&"run", &"--config", &"/no/site.toml"]);
    ended.refused(SETTING, &["/no/site.toml"]);
}

#[test]
fn a_mask_of_other_voxels_than_the_bundle_maps_is_refused() {
    let _turn = one_at_a_time();
    let dir = short_folder();
    system_tests::program::run(
        "afterimage",
        &[
            &"simulate",
            &"--prepare",
            &"--site",
            &dir.path(),
            &"--voxels",
            &"499",
        ],
    )
    .succeeded();
    let mask = dir.path().join("mask.nii");
    let site = Site::new(signed(), &mask, &phantom().site.join("events.tsv"));
    refused(&site, &["subject.mask", "expected 500 voxels", "found 499"]);
}

#[test]
fn a_key_or_bundle_that_cannot_be_trusted_is_refused() {
    let _turn = one_at_a_time();
    let made = signed();
    let site = Site::of_phantom(made, phantom());
    let (bundle, key) = (site.dir().join("bundle"), site.dir().join("site.pub"));
    let before = format!("{:?}", made.keys.public);
    site.change(&before, &format!("{key:?}"));

    refused(&site, &["model.key", "site.pub"]);
    fs::write(&key, "untrusted comment: nothing\nbm90IGEga2V5\n").unwrap();
    refused(&site, &["model.key", "site.pub"]);
    let stranger = material::keygen(site.dir(), "stranger");
    fs::copy(&stranger.public, &key).unwrap();
    refused(&site, &["manifest.json.minisig"]);

    fs::copy(&made.keys.public, &key).unwrap();
    copy_dir(&made.bundle, &bundle);
    site.change(&format!("{:?}", made.bundle), "\"bundle\"");
    let weights = bundle.join("weights/unclip.bin");
    let mut bytes = fs::read(&weights).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&weights, bytes).unwrap();
    refused(&site, &["weights/unclip.bin", "SHA-256"]);
    fs::remove_file(bundle.join("manifest.json.minisig")).unwrap();
    refused(&site, &["manifest.json.minisig"]);
    fs::write(bundle.join("manifest.json"), "{}").unwrap();
    refused(&site, &["manifest.json"]);
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy_dir(&path, &target);
        } else {
            fs::copy(path, target).unwrap();
        }
    }
}

#[test]
fn a_run_of_another_tr_is_refused_with_both_values_and_the_daemon_goes_on() {
    let _turn = one_at_a_time();
    let site = Site::of_phantom(signed(), phantom());
    site.change("tr_ms = 1500", "tr_ms = 2000");
    let mut daemon = Daemon::start(&site);
    Scanner::new(&site.scanner_folder()).send_all(&phantom().files[..3]);
    let fault = daemon.wait("the refusal", |daemon| daemon.faults().into_iter().next());
    assert!(
        fault.contains("1500 ms") && fault.contains("2000 ms"),
        "{fault}"
    );
    daemon.stop();
    // One fault for the series, not one per volume.
    assert_eq!(daemon.log().matches("A series is refused").count(), 1);
}

#[test]
fn lost_doubled_and_swapped_volumes_cost_no_picture() {
    let _turn = one_at_a_time();
    let site = Site::of_phantom(signed(), phantom());
    let mut daemon = Daemon::start(&site);
    let mut scanner = Scanner::new(&site.scanner_folder());
    let all = &phantom().files;
    // One in twenty never comes: 13, 33, 53.
    let mut files: Vec<&PathBuf> = all
        .iter()
        .enumerate()
        .filter(|(index, _)| index % 20 != 12)
        .map(|(_, file)| file)
        .collect();
    // The others come as third, first, second of each three.
    for three in files.chunks_exact_mut(3) {
        three.rotate_right(1);
    }
    let mut doubles = 0;
    for (index, file) in files.iter().enumerate() {
        scanner.send(file);
        if index % 7 == 3 {
            let again = format!("002_{index:06}.dcm");
            scanner.send_as(&fs::read(file).unwrap(), &again);
            doubles += 1;
        }
    }
    daemon.wait_for_trials(TRIALS);
    let ignored = daemon
        .log()
        .matches("volume was in already, ignored")
        .count();
    assert_eq!(ignored, doubles);
    assert_eq!(volumes_in(&daemon), files.len());
    let faults = daemon.faults();
    daemon.check(
        faults.is_empty(),
        &format!("every trial has enough volumes, yet {faults:?}"),
    );
    daemon.stop();
}

#[test]
fn a_trial_with_too_many_lost_volumes_is_skipped_by_name_and_the_others_are_not() {
    let _turn = one_at_a_time();
    let site = Site::of_phantom(signed(), phantom());
    let mut daemon = Daemon::start(&site);
    let mut scanner = Scanner::new(&site.scanner_folder());
    let files = &phantom().files;
    // Trial 6 has its onset at volume 29 and is decoded at volume 34; two of its six volumes are in
    // no other trial's window.
    scanner.send_all(&files[..30]);
    scanner.send_all(&files[32..]);
    let last = u64::from(TRIALS);
    daemon.wait("the last trial", |daemon| {
        daemon.pictured().contains(&last).then_some(())
    });
    let expected: Vec<u64> = (1..=last).filter(|&trial| trial != 6).collect();
    let pictured = daemon.pictured();
    daemon.check(pictured == expected, &format!("pictures of {pictured:?}"));
    let faults = daemon.faults();
    daemon.check(
        faults.len() == 1 && faults[0].contains("trial 6 is skipped"),
        &format!("{faults:?}"),
    );
    daemon.stop();
}

#[test]
fn a_scanner_that_stalls_is_named_once_with_the_last_hop_seen() {
    let _turn = one_at_a_time();
    let site = Site::of_phantom(signed(), phantom());
    let mut daemon = Daemon::start(&site);
    let mut scanner = Scanner::new(&site.scanner_folder());
    let files = &phantom().files;
    scanner.send_all(&files[..20]);
    let stopped = Instant::now();
    let stalls = daemon.wait("the stall to be said", |daemon| {
        Some(daemon.stalls()).filter(|stalls| !stalls.is_empty())
    });
    println!(
        "said {:?} after the last volume: {stalls:?}",
        stopped.elapsed()
    );
    daemon.check(
        stalls[0].contains("after number 20") && stalls[0].contains("no file comes"),
        &format!("{stalls:?}"),
    );
    std::thread::sleep(Duration::from_secs(2));
    daemon.check(daemon.stalls().len() == 1, "one pause was said twice");
    scanner.send_all(&files[20..]);
    daemon.wait_for_trials(TRIALS);
    // Once every trial has its volumes, none is missed.
    daemon.check(
        daemon.faults().is_empty(),
        "a pause costs nothing, yet there are faults",
    );
    daemon.stop();
}

#[test]
fn an_aborted_run_that_starts_again_is_a_new_run() {
    let _turn = one_at_a_time();
    let site = Site::of_phantom(signed(), phantom());
    let mut daemon = Daemon::start(&site);
    let mut scanner = Scanner::new(&site.scanner_folder());
    scanner.send_all(&phantom().files[..15]);
    // The same person and the same protocol, a new series.
    let again = site.dir().join("again");
    fs::create_dir(&again).unwrap();
    system_tests::program::run(
        "afterimage",
        &[
            &"simulate",
            &"--site",
            &phantom().site,
            &"--into",
            &again,
            &"--speed",
            &"1000",
        ],
    )
    .succeeded();
    for file in system_tests::scanner::files_of(&again) {
        let name = format!("002_{}", name_of(&file));
        scanner.send_as(&fs::read(&file).unwrap(), &name);
    }
    daemon.wait("every trial of run 2", |daemon| {
        let board = daemon.board();
        let trials = board["trials"].as_array().unwrap();
        let second = trials.iter().filter(|trial| trial["run"] == 2).count();
        (second == usize::try_from(TRIALS).unwrap()).then_some(())
    });
    daemon.stop();
}

/// When each whole trial of run 1 was last written.
fn written(daemon: &Daemon<'_>) -> BTreeMap<u32, Vec<(PathBuf, SystemTime)>> {
    let times = |(trial, note): (u32, PathBuf)| {
        let begin = format!("run001-trial{trial:03}-fast");
        let mut files: Vec<(PathBuf, SystemTime)> = fs::read_dir(note.parent().unwrap())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| name_of(path).starts_with(&begin))
            .map(|path| {
                let at = fs::metadata(&path).unwrap().modified().unwrap();
                (path, at)
            })
            .collect();
        files.sort();
        (trial, files)
    };
    daemon.recorded().into_iter().map(times).collect()
}

#[test]
fn a_daemon_killed_whole_takes_up_its_run_where_it_was() {
    let _turn = one_at_a_time();
    let site = Site::of_phantom(signed(), phantom());
    let mut daemon = Daemon::start(&site);
    let mut scanner = Scanner::new(&site.scanner_folder());
    let files = &phantom().files;
    scanner.send_all(&files[..35]);
    daemon.wait_for_notes(4);
    let below = daemon.kill();
    // A second parser waits beside the first.
    assert_eq!(below.len(), 5, "acquire, two parsers, decode and show");
    let killed = Instant::now();
    while !daemon.left().is_empty() {
        assert!(killed.elapsed() < GONE_WITHIN, "some of {below:?} are left");
        std::thread::sleep(Duration::from_millis(50));
    }
    println!(
        "all roles were gone {:?} after their supervisor",
        killed.elapsed()
    );
    let before = written(&daemon);
    assert!(before.len() >= 4);
    let session = site.session();

    // The scanner does not wait.
    scanner.send_all(&files[35..40]);
    let mut daemon = Daemon::start(&site);
    let board = daemon.board();
    assert_eq!(board["session"]["id"], name_of(&session));
    scanner.send_all(&files[40..]);
    daemon.wait_for_trials(TRIALS);
    daemon.wait_for_notes(TRIALS);
    assert_eq!(site.session(), session);
    let after = written(&daemon);
    for (trial, files) in before {
        assert_eq!(after[&trial], files, "trial {trial} was decoded twice");
        let found = daemon
            .log()
            .matches("trial is on record, not decoded again")
            .count();
        daemon.check(found > 0, "no trial was found on record");
    }
    daemon.check(
        daemon.faults().is_empty(),
        "nothing was lost, yet there are faults",
    );
    daemon.stop();
    assert!(!site.state().join("current").exists());
}

#[test]
fn a_second_daemon_in_the_same_place_says_that_another_runs() {
    let _turn = one_at_a_time();
    let site = Site::of_phantom(signed(), phantom());
    let mut first = Daemon::start(&site);
    let mut second = Daemon::spawn(&site);
    let status = second.ended(PATIENCE);
    assert_eq!(status.code(), Some(1), "{}", second.log());
    assert!(
        second.log().contains("another afterimage runs here"),
        "{}",
        second.log()
    );
    drop(second);
    first.wait_until_up();
    assert_eq!(first.get("/healthz").status, 200);
    first.stop();
}

#[test]
fn a_scanner_folder_that_goes_and_comes_back_is_said_and_survived() {
    let _turn = one_at_a_time();
    let site = Site::of_phantom(signed(), phantom());
    let mut daemon = Daemon::start(&site);
    let (folder, away) = (site.scanner_folder(), site.dir().join("away"));
    let mut scanner = Scanner::new(&folder);
    let (before, after) = phantom().files.split_at(30);
    scanner.send_all(before);
    daemon.wait("the first volumes", |daemon| {
        (volumes_in(daemon) == 30).then_some(())
    });
    fs::rename(&folder, &away).unwrap();
    let said = |daemon: &mut Daemon<'_>, what: &str| {
        daemon
            .faults()
            .iter()
            .any(|fault| fault.contains(what))
            .then_some(())
    };
    daemon.wait("the loss to be said", |daemon| {
        said(daemon, "cannot be read")
    });
    fs::rename(&away, &folder).unwrap();
    daemon.wait("the return to be said", |daemon| said(daemon, "is back"));
    scanner.send_all(after);
    daemon.wait_for_trials(TRIALS);
    daemon.stop();
}
