//! The front end, live: every vendor's files, the trigger line, the parser, faults and registration,
//! through a running daemon, told by what it records.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
#![expect(clippy::print_stdout, reason = "a test says what it found")]

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use system_tests::daemon::Daemon;
use system_tests::material::{Phantom, TRIALS, VOXELS, phantom, short_folder, signed};
use system_tests::program::run;
use system_tests::record::{list, numbers, replay, show};
use system_tests::scanner::{Scanner, deliver, files_of, name_of};
use system_tests::simulator::Simulator;
use system_tests::site::Site;
use system_tests::{numbers as arrays, one_at_a_time};

/// Of true and estimated betas; the phantom's noise leaves about 0.8.
const LEAST_CORRELATION: f64 = 0.5;
/// The first trials are estimated from too few volumes.
const UNCERTAIN_TRIALS: usize = 2;
/// Pace of simulated runs: ten volumes a second.
const SPEED: &str = "15";

/// Volumes that are on record, of every run.
fn volumes_in(daemon: &Daemon<'_>) -> usize {
    daemon.log().matches("volume in").count()
}

#[track_caller]
fn wait_for_volumes(daemon: &mut Daemon<'_>, volumes: usize) {
    daemon.wait(&format!("{volumes} volumes"), |daemon| {
        (volumes_in(daemon) >= volumes).then_some(())
    });
}

/// Waits until every trial of the phantom has its first estimate, whether a picture follows or not.
#[track_caller]
fn wait_for_estimates(daemon: &mut Daemon<'_>, session: &Path, run: usize) {
    daemon.wait("every trial's first estimate", |_| {
        let report = show(session);
        let trials = report["runs"][run - 1]["trials"].as_array()?.clone();
        let fast = trials.iter().filter(|trial| trial["tier"] == "fast");
        (fast.count() == TRIALS as usize).then_some(())
    });
}

/// Correlation of a run's first estimates with the truth.
fn recovered(session: &Path, run: u32, phantom: &Phantom) -> f64 {
    let found = arrays::read(&session.join(format!("runs/{run:03}/fast-betas.npy")));
    let truth = arrays::read(&phantom.site.join("true_betas.npy"));
    arrays::mean_correlation(&found, &truth, UNCERTAIN_TRIALS)
}

fn frames(report: &Value, run: usize, name: &str) -> Vec<u64> {
    numbers(list(&report["runs"][run - 1], name), "frame")
}

/// Lets a simulated run of a format pass the daemon, and looks for its betas.
///
/// - `killed_after`: volumes after which acquisition is killed and taken up again.
fn recovers(format: &str, killed_after: Option<usize>) {
    let _turn = one_at_a_time();
    let site = Site::of_phantom(signed(), phantom());
    let mut daemon = Daemon::start(&site);
    let mut simulator = Simulator::start(
        &site.scanner_folder(),
        &["--speed", SPEED, "--format", format],
        &[("--site", &phantom().site)],
    );
    if let Some(volumes) = killed_after {
        wait_for_volumes(&mut daemon, volumes);
        daemon.kill_role("acquire");
    }
    simulator.finish(&mut daemon);
    let session = site.session();
    wait_for_estimates(&mut daemon, &session, 1);
    let faults = daemon.faults();
    daemon.stop();

    let report = show(&session);
    assert_eq!(list(&report, "runs").len(), 1, "{format}");
    let volumes = list(&simulator.truth()["series"][0], "volumes").len();
    let mut frames = frames(&report, 1, "volumes");
    frames.sort_unstable();
    let expected: Vec<u64> = (0..u64::try_from(volumes).unwrap()).collect();
    assert_eq!(frames, expected, "{format}");
    assert_eq!(faults, [""; 0], "{format}");
    // What a restart reads again came once.
    let doubled = list(&report["runs"][0], "doubled");
    assert!(doubled.is_empty(), "{format}: {doubled:?}");
    let correlation = recovered(&session, 1, phantom());
    println!("{format}: {volumes} volumes, betas and truth correlate by {correlation:.3}");
    assert!(correlation > LEAST_CORRELATION, "{format}: {correlation}");
    assert_eq!(
        replay(&session)
            .succeeded()
            .stdout
            .matches("differs")
            .count(),
        0
    );
}

#[test]
fn a_run_of_siemens_xa_files_is_recovered() {
    recovers("xa", None);
}

#[test]
fn a_run_of_ge_slices_is_recovered() {
    recovers("ge", None);
}

#[test]
fn a_run_of_philips_slices_is_recovered() {
    recovers("philips", None);
}

#[test]
fn a_run_of_one_nifti_file_per_volume_is_recovered() {
    recovers("nifti", None);
}

#[test]
fn a_run_of_one_growing_nifti_file_is_recovered() {
    recovers("nifti4d", None);
}

#[test]
fn slices_of_a_volume_that_was_not_whole_survive_a_kill() {
    recovers("ge", Some(25));
}

#[test]
fn a_series_of_nifti_files_survives_a_kill() {
    recovers("nifti", Some(25));
}

#[test]
fn a_growing_nifti_file_survives_a_kill() {
    recovers("nifti4d", Some(25));
}

/// A mask of [`VOXELS`] voxels on the grid of a series: the brightest of its first volume.
fn mask_of(series: &Path, dir: &Path) -> PathBuf {
    let out = dir.join("volumes");
    run("afterimage", &[&"volumes", &series, &"--out", &out]).succeeded();
    let packed = fs::read(out.join("series001.nii.gz")).unwrap();
    let mut image = Vec::new();
    flate2::read::GzDecoder::new(packed.as_slice())
        .read_to_end(&mut image)
        .unwrap();
    let side = |axis: usize| u16::from_le_bytes([image[40 + 2 * axis], image[41 + 2 * axis]]);
    let voxels: usize = (1..=3).map(|axis| usize::from(side(axis))).product();
    let values = &image[352..];
    let value = |voxel: usize| match image[70] {
        // Unsigned and signed words, and single precision.
        4 => f32::from(i16::from_le_bytes([
            values[2 * voxel],
            values[2 * voxel + 1],
        ])),
        16 => {
            let at = 4 * voxel;
            f32::from_le_bytes(values[at..at + 4].try_into().unwrap())
        }
        _ => f32::from(u16::from_le_bytes([
            values[2 * voxel],
            values[2 * voxel + 1],
        ])),
    };
    let mut order: Vec<usize> = (0..voxels).collect();
    order.sort_by(|a, b| value(*b).total_cmp(&value(*a)));
    let mut mask = image[..352].to_vec();
    // One volume of bytes, not scaled.
    mask[40..42].copy_from_slice(&3_u16.to_le_bytes());
    mask[48..50].copy_from_slice(&1_u16.to_le_bytes());
    mask[70..72].copy_from_slice(&2_u16.to_le_bytes());
    mask[72..74].copy_from_slice(&8_u16.to_le_bytes());
    mask[112..116].copy_from_slice(&1_f32.to_le_bytes());
    mask[116..120].copy_from_slice(&0_f32.to_le_bytes());
    mask.resize(352 + voxels, 0);
    for voxel in &order[..VOXELS] {
        mask[352 + voxel] = 1;
    }
    let path = dir.join("mask.nii");
    fs::write(&path, mask).unwrap();
    path
}

/// The shared series of scanners that write slices, where they are there.
#[test]
fn every_volume_of_real_slices_is_in_once_its_slices_are() {
    let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/scanner/dicom");
    if !shared.is_dir() {
        println!("{} was not found, nothing is tested", shared.display());
        return;
    }
    let _turn = one_at_a_time();
    for (series, volumes) in [
        ("ge_ascending_triggertime", 16),
        ("ge_interleaved_i2s", 3),
        ("philips_classic_epi", 3),
        ("philips_classic_fmri", 2),
    ] {
        let dir = short_folder();
        let mask = mask_of(&shared.join(series), dir.path());
        let site = Site::new(signed(), &mask, &phantom().site.join("events.tsv"));
        site.change("tr_ms = 1500\n", "");
        let mut daemon = Daemon::start(&site);
        for file in files_of(&shared.join(series)) {
            deliver(
                &fs::read(&file).unwrap(),
                &site.scanner_folder(),
                name_of(&file),
            );
        }
        wait_for_volumes(&mut daemon, volumes);
        let faults = daemon.faults();
        daemon.stop();
        let log = daemon.log();
        assert!(!log.contains("ZZ"), "{series}: the log names a patient");
        let report = show(&site.session());
        assert!(!report.to_string().contains("ZZ"), "{series}");
        let mut frames = frames(&report, 1, "volumes");
        frames.sort_unstable();
        let expected: Vec<u64> = (0..u64::try_from(volumes).unwrap()).collect();
        assert_eq!(frames, expected, "{series}");
        assert_eq!(faults, [""; 0], "{series}");
    }
}

/// TR of runs with a trigger line: real time, since pulses are checked against the header's TR.
const TRIGGERED_TR_MS: f64 = 500.0;
/// How far a volume's start may be from the truth where the machine does what it should.
const START_WITHIN_MS: f64 = 20.0;
/// The simulator sleeps until each pulse and a busy machine wakes it late: so many of a hundred volumes may
/// be further off, and none by as much as a third of a TR, where the next volume's pulse is nowhere near.
const LATE_PULSES_PERCENT: usize = 10;
const NEVER_APART_MS: f64 = TRIGGERED_TR_MS / 3.0;
/// Before its first pulse, so that the daemon has found the line.
const WAIT_S: &str = "2";

/// A run with pulses; returns how far each volume's start is from its time, milliseconds, by frame.
fn triggered(daemon: &mut Daemon<'_>, site: &Site, run: usize, more: &[&str]) -> Vec<f64> {
    let line = site.dir().join("trigger");
    let mut words = vec![
        "--tr",
        "0.5",
        "--volumes",
        "44",
        "--wait",
        WAIT_S,
        "--fault",
        "lost-pulses=9,17-18,30",
        "--fault",
        "spurious-pulses=13,24,37",
        "--fault",
        "noise-bytes=15",
    ];
    words.extend(more);
    let before = volumes_in(daemon);
    let mut simulator = Simulator::start(&site.scanner_folder(), &words, &[("--pulses", &line)]);
    simulator.finish(daemon);
    wait_for_volumes(daemon, before + 44);

    let report = show(&site.session());
    let zero_ms = simulator.zero_ms() + 1e3 * WAIT_S.parse::<f64>().unwrap();
    let truth = simulator.truth();
    let volumes = list(&report["runs"][run - 1], "volumes");
    assert_eq!(volumes.len(), 44);
    let known = |how: &str| {
        let found = volumes.iter().filter(|v| v["start_known"] == how);
        numbers(&found.cloned().collect::<Vec<Value>>(), "frame")
    };
    let apart = volumes.iter().map(|volume| {
        let frame = usize::try_from(volume["frame"].as_u64().unwrap()).unwrap();
        let start_s = truth["series"][0]["volumes"][frame]["start_s"]
            .as_f64()
            .unwrap();
        volume["start_ms"].as_f64().unwrap() - (zero_ms + start_s * 1e3)
    });
    let apart: Vec<f64> = apart.collect();
    // A pulse that a busy machine sends late may be taken for one too many, and is bridged as well.
    let bridged = known("bridged");
    assert!(
        [8, 16, 17, 29].iter().all(|frame| bridged.contains(frame)),
        "{bridged:?}"
    );
    assert!(
        known("pulse").len() >= 22,
        "only {} by pulse",
        known("pulse").len()
    );
    assert_eq!(
        bridged.len() + known("pulse").len(),
        44,
        "not all by the line"
    );
    apart
}

#[track_caller]
fn check_starts(apart_ms: &[f64]) {
    let mut sorted = apart_ms.to_vec();
    sorted.sort_by(f64::total_cmp);
    // The simulator's clock starts a little after it has written the truth, on a busy machine later.
    let zero_ms = sorted[sorted.len() / 2];
    let largest = apart_ms
        .iter()
        .fold(0.0_f64, |most, ms| most.max((ms - zero_ms).abs()));
    let late = apart_ms
        .iter()
        .filter(|ms| (*ms - zero_ms).abs() > START_WITHIN_MS);
    let late = late.count();
    println!(
        "{} volumes: starts {zero_ms:.1} ms after the truth was written, {largest:.1} ms from that at most, \
         {late} beyond {START_WITHIN_MS} ms",
        apart_ms.len()
    );
    assert!(
        zero_ms.abs() < NEVER_APART_MS && largest < NEVER_APART_MS,
        "{apart_ms:?}"
    );
    assert!(
        late * 100 <= LATE_PULSES_PERCENT * apart_ms.len(),
        "{apart_ms:?}"
    );
}

#[test]
fn volumes_begin_with_their_pulses_whatever_is_lost_or_too_many() {
    let _turn = one_at_a_time();
    let site = Site::of_phantom(signed(), phantom());
    site.change("tr_ms = 1500", "tr_ms = 500");
    let line = site.dir().join("trigger");
    site.change(
        "[task]",
        &format!("[trigger]\ndevice = {line:?}\nprotocol = \"arduino-5\"\n[task]"),
    );
    let mut daemon = Daemon::start(&site);
    let apart = triggered(&mut daemon, &site, 1, &[]);
    check_starts(&apart);
    let said = |daemon: &Daemon<'_>, words: &[&str]| {
        let faults = daemon.faults();
        let said = |fault: &String| words.iter().all(|word| fault.contains(word));
        faults.iter().any(said)
    };
    daemon.check(
        said(&daemon, &["Run 1", "volume 9", "lost"]),
        "the lost pulse is not said",
    );

    // The line goes with the simulator: said, and the daemon goes on.
    daemon.wait("the lost line to be said", |daemon| {
        said(daemon, &["trigger"]).then_some(())
    });
    // It comes back with the next run, which has no times in its headers.
    // Its dummies take longer than an export may, so that they are known from the arrivals.
    let words = ["--format", "nifti", "--seed", "2", "--dummies", "5"];
    let apart = triggered(&mut daemon, &site, 2, &words);
    check_starts(&apart);
    daemon.stop();
    let report = show(&site.session());
    // A pulse for each volume, less four lost, and three too many, twice; and the dummies.
    assert_eq!(list(&report, "pulses_ms").len(), 2 * (44 - 4 + 3) + 5);
}

/// The parsers that run below the daemon.
fn parsers(daemon: &mut Daemon<'_>) -> Vec<i32> {
    daemon.roles("parse")
}

/// Largest time from a file to its voxels that the log tells, milliseconds.
fn longest_ms(log: &str) -> f64 {
    let lines = log.lines().filter(|line| line.contains("volume in"));
    let took = lines.filter_map(|line| {
        let (_, rest) = line.split_once("took_ms=")?;
        let number = rest
            .split(|c: char| !c.is_ascii_digit() && c != '.')
            .next()?;
        number.parse::<f64>().ok()
    });
    took.fold(0.0, f64::max)
}

#[test]
fn parsers_that_are_killed_cost_no_volume_and_no_time() {
    let _turn = one_at_a_time();
    let site = Site::of_phantom(signed(), phantom());
    let mut daemon = Daemon::start(&site);
    let files = &phantom().files;
    let mut scanner = Scanner::new(&site.scanner_folder());
    let mut killed = 0;
    for (index, file) in files.iter().enumerate() {
        scanner.send(file);
        // One of the two, then both at once, again and again.
        let victims = match index % 8 {
            3 => 1,
            7 => 2,
            _ => 0,
        };
        for pid in parsers(&mut daemon).into_iter().take(victims) {
            // It may be on its way out.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            killed += 1;
        }
    }
    assert!(killed > 12, "only {killed} parsers were killed");
    wait_for_volumes(&mut daemon, files.len());
    daemon.wait_for_trials(TRIALS);
    let faults = daemon.faults();
    daemon.stop();
    assert_eq!(faults, [""; 0]);
    let longest = longest_ms(&daemon.log());
    println!("{killed} parsers killed, longest way of a volume {longest:.0} ms");
    // A TR at real time, on a machine that does other things as well.
    assert!(longest > 0.0 && longest < 1500.0, "{longest} ms");
    let report = show(&site.session());
    assert_eq!(frames(&report, 1, "volumes").len(), files.len());
    assert!(list(&report, "put_aside").is_empty());
}

#[test]
fn a_parser_that_hangs_is_stopped_and_its_file_alone_is_put_aside() {
    let _turn = one_at_a_time();
    let site = Site::of_phantom(signed(), phantom());
    site.change("[web]", "[limits]\nparse_timeout_ms = 500\n[web]");
    let mut daemon = Daemon::start(&site);
    let files = &phantom().files;
    let mut scanner = Scanner::new(&site.scanner_folder());
    scanner.send_all(&files[..20]);
    wait_for_volumes(&mut daemon, 20);
    let before = parsers(&mut daemon);
    // The one that serves hangs, and the one in reserve does not: whichever is asked next.
    for pid in &before {
        kill(Pid::from_raw(*pid), Signal::SIGSTOP).unwrap();
    }
    let hung = Instant::now();
    scanner.send(&files[20]);
    daemon.wait("the file to be put aside", |daemon| {
        let said = |fault: &String| fault.contains("took longer than 500 ms");
        daemon.faults().iter().any(said).then_some(())
    });
    assert!(hung.elapsed() < Duration::from_secs(10));
    for pid in &before {
        // One of them is gone, as it should be.
        let _ = kill(Pid::from_raw(*pid), Signal::SIGCONT);
    }
    scanner.send_all(&files[21..]);
    wait_for_volumes(&mut daemon, files.len() - 1);
    daemon.wait_for_trials(TRIALS);
    daemon.stop();
    let report = show(&site.session());
    assert_eq!(list(&report, "put_aside").len(), 1);
    assert_eq!(frames(&report, 1, "lost"), [20]);
}

#[test]
fn every_fault_of_a_run_is_on_record() {
    let _turn = one_at_a_time();
    let site = Site::of_phantom(signed(), phantom());
    let mut daemon = Daemon::start(&site);
    let mut simulator = Simulator::start(
        &site.scanner_folder(),
        &[
            "--speed",
            SPEED,
            "--motion",
            "still",
            "--fault",
            "drop=9",
            "--fault",
            "duplicate=15",
            "--fault",
            "reorder=21",
            "--fault",
            "truncate=27",
            "--fault",
            "motion-step=40:3",
            "--fault",
            "stall=46:45",
        ],
        &[("--site", &phantom().site)],
    );
    simulator.finish(&mut daemon);
    let session = site.session();
    wait_for_estimates(&mut daemon, &session, 1);
    let stalls = daemon.stalls();
    daemon.check(
        stalls.iter().any(|text| text.contains("Run 1")),
        "a pause of three seconds is not said",
    );
    daemon.stop();

    let report = show(&session);
    assert_eq!(frames(&report, 1, "lost"), [8, 26]);
    assert_eq!(frames(&report, 1, "doubled"), [14]);
    assert_eq!(list(&report, "put_aside").len(), 1);
    let volumes = list(&report["runs"][0], "volumes");
    let late: Vec<u64> = numbers(
        &volumes
            .iter()
            .filter(|v| v["late"] == true)
            .cloned()
            .collect::<Vec<_>>(),
        "frame",
    );
    // The two that change places leave within a moment; found together, they are taken in their order.
    assert!(late.is_empty() || late == [20], "{late:?}");
    assert_eq!(volumes.len(), 58);
    // The step is a spike; before it the head lies still, and from then on 3 mm elsewhere.
    let of = |frame: u64| volumes.iter().find(|v| v["frame"] == frame).unwrap();
    assert_eq!(of(39)["quality"]["spike"], true);
    assert_eq!(of(35)["quality"]["spike"], false);
    for (frame, expected) in [(35, 0.0), (39, 3.0), (44, 3.0)] {
        let found = of(frame)["quality"]["displacement_mm"].as_f64().unwrap();
        assert!((found - expected).abs() < 0.15, "frame {frame}: {found} mm");
    }
    let trials = list(&report["runs"][0], "trials");
    let fast: Vec<&Value> = trials.iter().filter(|t| t["tier"] == "fast").collect();
    assert!(
        fast.iter().all(|trial| trial["skipped"].is_null()),
        "{fast:?}"
    );
    // The last early one has both holes in its window.
    assert_eq!(fast.last().unwrap()["missing"], 2);
    let text = run("afterimage", &[&"session", &"show", &session]).succeeded();
    assert!(
        text.stdout.contains("1 came twice, 2 never"),
        "{}",
        text.stdout
    );
    replay(&session).succeeded();
}

#[test]
fn an_aborted_run_keeps_its_events_for_the_one_that_follows() {
    let _turn = one_at_a_time();
    let site = Site::of_phantom(signed(), phantom());
    let events = phantom().site.join("events.tsv");
    site.change(&format!("{events:?}"), "\"run-{run}.tsv\"");
    let first = fs::read_to_string(&events).unwrap();
    let second: Vec<&str> = first.lines().take(3).collect();
    let second = format!("{}\n", second.join("\n"));
    fs::write(site.dir().join("run-1.tsv"), &first).unwrap();
    fs::write(site.dir().join("run-2.tsv"), &second).unwrap();
    let mut daemon = Daemon::start(&site);
    let mut simulator = Simulator::start(
        &site.scanner_folder(),
        &["--speed", SPEED, "--fault", "abort=14:30"],
        &[("--site", &phantom().site)],
    );
    simulator.finish(&mut daemon);
    let session = site.session();
    wait_for_estimates(&mut daemon, &session, 2);
    let before = volumes_in(&daemon);
    let mut third = Simulator::start(
        &site.scanner_folder(),
        &["--speed", SPEED, "--volumes", "6", "--seed", "3"],
        &[],
    );
    third.finish(&mut daemon);
    wait_for_volumes(&mut daemon, before + 6);
    daemon.stop();
    let kept =
        |run: u32| fs::read_to_string(session.join(format!("runs/{run:03}/events.tsv"))).unwrap();
    assert_eq!(
        [kept(1), kept(2), kept(3)],
        [&first, &first, &second].map(Clone::clone)
    );
    let report = show(&session);
    assert_eq!(list(&report, "runs").len(), 3);
    assert_eq!(frames(&report, 1, "volumes").len(), 14);
    let correlation = recovered(&session, 2, phantom());
    assert!(correlation > LEAST_CORRELATION, "{correlation}");
}

#[test]
fn two_series_at_once_are_two_runs_with_the_same_betas() {
    let _turn = one_at_a_time();
    let site = Site::of_phantom(signed(), phantom());
    let mut daemon = Daemon::start(&site);
    let mut simulator = Simulator::start(
        &site.scanner_folder(),
        &["--speed", "8", "--fault", "two-series"],
        &[("--site", &phantom().site)],
    );
    simulator.finish(&mut daemon);
    let session = site.session();
    wait_for_estimates(&mut daemon, &session, 1);
    wait_for_estimates(&mut daemon, &session, 2);
    daemon.stop();
    let betas = |run: u32| arrays::read(&session.join(format!("runs/{run:03}/fast-betas.npy")));
    assert_eq!(betas(1), betas(2));
    replay(&session).succeeded();
}

/// The early betas of the phantom's run, whose acquisition is killed after some volumes.
fn betas_of_a_run(kills: &[usize]) -> ndarray::Array2<f64> {
    let site = Site::of_phantom(signed(), phantom());
    let mut daemon = Daemon::start(&site);
    let files = &phantom().files;
    let mut scanner = Scanner::new(&site.scanner_folder());
    for (index, file) in files.iter().enumerate() {
        scanner.send(file);
        if kills.contains(&index) {
            daemon.kill_role("acquire");
        }
    }
    let session = site.session();
    wait_for_estimates(&mut daemon, &session, 1);
    daemon.stop();
    let report = show(&session);
    assert_eq!(list(&report, "starts").len(), 1 + kills.len());
    assert_eq!(frames(&report, 1, "volumes").len(), files.len());
    replay(&session).succeeded();
    arrays::read(&session.join("runs/001/fast-betas.npy"))
}

#[test]
fn a_run_killed_in_the_middle_has_the_betas_of_an_undisturbed_one() {
    let _turn = one_at_a_time();
    let undisturbed = betas_of_a_run(&[]);
    let killed = betas_of_a_run(&[23, 41]);
    let differ = undisturbed.iter().zip(&killed);
    let differ = differ.filter(|(a, b)| a.to_bits() != b.to_bits()).count();
    assert_eq!(differ, 0, "of {} betas", undisturbed.len());
}

#[test]
fn what_is_no_session_is_not_shown() {
    let dir = short_folder();
    let ended = run("afterimage", &[&"session", &"show", &dir.path(), &"--json"]);
    let ended = ended.refused(1, &["is not a session's folder", "session.json"]);
    assert_eq!(ended.stdout, "");
}

/// The still head as a NIfTI volume, on a grid.
fn still_head(dir: &Path, grid: &[&str]) -> PathBuf {
    let into = dir.join("head");
    fs::create_dir(&into).unwrap();
    let mut words: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![
        &"simulate",
        &"--format",
        &"nifti",
        &"--volumes",
        &"3",
        &"--motion",
        &"still",
        &"--speed",
        &"1000",
        &"--into",
    ];
    words.push(&into);
    words.extend(grid.iter().map(|word| word as &dyn AsRef<std::ffi::OsStr>));
    run("afterimage", &words).succeeded();
    into.join("001_000001.nii")
}

/// The same field of view in fewer, larger voxels.
const COARSER: [&str; 4] = ["--grid", "48x48x21", "--voxel-mm", "4x4x4.5"];
/// Farthest that a place of the head may be from where registration says, millimetres: a quarter of a voxel.
const REGISTERED_WITHIN_MM: f64 = 1.0;

/// How far a registration takes places of the head from where `truth` does, millimetres.
fn farthest_mm(registration: &Value, truth: impl Fn([f64; 3]) -> [f64; 3]) -> f64 {
    let row = |row: usize| -> Vec<f64> {
        let row = registration[row]
            .as_array()
            .unwrap_or_else(|| panic!("{registration}"));
        row.iter().map(|number| number.as_f64().unwrap()).collect()
    };
    let mut farthest = 0.0_f64;
    for corner in 0..8 {
        let place = [0, 1, 2].map(|axis| if corner >> axis & 1 == 1 { 40.0 } else { -40.0 });
        let expected = truth(place);
        let squares = (0..3).map(|axis| {
            let row = row(axis);
            let found: f64 = (0..3).map(|k| row[k] * place[k]).sum::<f64>() + row[3];
            (found - expected[axis]).powi(2)
        });
        farthest = farthest.max(squares.sum::<f64>().sqrt());
    }
    farthest
}

#[test]
fn a_run_on_another_grid_is_taken_where_it_can_be_registered_and_else_refused() {
    let _turn = one_at_a_time();
    let dir = short_folder();
    let reference = still_head(dir.path(), &[]);
    let mut words = vec!["--speed", "10", "--volumes", "8", "--motion", "still"];
    words.extend(COARSER);
    for registered in [false, true] {
        let site = Site::of_phantom(signed(), phantom());
        if registered {
            site.change(
                "[subject]",
                &format!("[subject]\nreference = {reference:?}"),
            );
        }
        let mut daemon = Daemon::start(&site);
        let mut simulator = Simulator::start(&site.scanner_folder(), &words, &[]);
        if !registered {
            daemon.wait("the refusal", |daemon| {
                let named = |fault: &String| fault.contains("refused") && fault.contains("mask");
                daemon.faults().iter().any(named).then_some(())
            });
            simulator.finish(&mut daemon);
            assert_eq!(volumes_in(&daemon), 0);
            daemon.stop();
            continue;
        }
        simulator.finish(&mut daemon);
        wait_for_volumes(&mut daemon, 8);
        let faults = daemon.faults();
        daemon.stop();
        assert_eq!(faults, [""; 0]);
        let report = show(&site.session());
        let apart = farthest_mm(&report["runs"][0]["registration_lps"], |place| place);
        println!("registered to another grid: {apart:.2} mm apart at most");
        assert!(apart < REGISTERED_WITHIN_MM, "{apart} mm");
    }
}

#[test]
fn a_head_that_lies_elsewhere_is_registered_and_its_betas_recovered() {
    let _turn = one_at_a_time();
    let dir = short_folder();
    let reference = still_head(dir.path(), &[]);
    // RAS: two voxels to the right, one back, one up, and turned by three degrees about the long axis.
    let moved = dir.path().join("moved.txt");
    fs::write(&moved, "6 -3 3.5 0 0 3\n".repeat(phantom().files.len())).unwrap();
    let site = Site::of_phantom(signed(), phantom());
    site.change(
        "[subject]",
        &format!("[subject]\nreference = {reference:?}"),
    );
    let mut daemon = Daemon::start(&site);
    let motion = format!("file={}", moved.display());
    let mut simulator = Simulator::start(
        &site.scanner_folder(),
        &["--speed", SPEED, "--motion", &motion],
        &[("--site", &phantom().site)],
    );
    simulator.finish(&mut daemon);
    let session = site.session();
    wait_for_estimates(&mut daemon, &session, 1);
    daemon.stop();
    let report = show(&session);
    let (sin, cos) = 3_f64.to_radians().sin_cos();
    // In LPS the shift turns round along two axes, and the turn about the third stays.
    let truth = |[x, y, z]: [f64; 3]| [cos * x - sin * y - 6.0, sin * x + cos * y + 3.0, z + 3.5];
    let apart = farthest_mm(&report["runs"][0]["registration_lps"], truth);
    let correlation = recovered(&session, 1, phantom());
    println!(
        "moved head: {apart:.2} mm apart at most, betas and truth correlate by {correlation:.3}"
    );
    assert!(apart < REGISTERED_WITHIN_MM, "{apart} mm");
    assert!(correlation > LEAST_CORRELATION, "{correlation}");
}
