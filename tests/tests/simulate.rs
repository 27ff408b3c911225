//! The simulated scanner, watched from outside: what `truth.json` says is what happened.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::fs::{self, File};
use std::io::Read;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;
use system_tests::material::short_folder;
use system_tests::one_at_a_time;
use system_tests::program::{Ended, command, finish};
use system_tests::scanner::{files_of, name_of};

/// How late a pulse may be on two cores that do other things as well.
const PULSE_WITHIN: Duration = Duration::from_millis(20);
/// A small head is soon made.
const SMALL: [&str; 8] = [
    "--grid",
    "32x32x12",
    "--voxel-mm",
    "6x6x8",
    "--volumes",
    "20",
    "--tr",
    "1",
];

/// A folder for the files and one for the truth.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Place {
        let dir = short_folder();
        fs::create_dir(dir.path().join("in")).unwrap();
        Place(dir)
    }

    fn incoming(&self) -> PathBuf {
        self.0.path().join("in")
    }

    fn truth(&self) -> Value {
        serde_json::from_slice(&fs::read(self.0.path().join("truth/truth.json")).unwrap()).unwrap()
    }

    fn simulate(&self, more: &[&str]) -> Command {
        let mut simulate = command("afterimage");
        simulate.arg("simulate").args(SMALL).args(more);
        simulate.arg("--into").arg(self.incoming());
        simulate.arg("--truth").arg(self.0.path().join("truth"));
        simulate
    }

    fn simulated(&self, more: &[&str]) -> Ended {
        finish(self.simulate(more)).succeeded()
    }

    fn file(&self, name: &str) -> Vec<u8> {
        fs::read(self.incoming().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    fn written(&self, name: &str) -> SystemTime {
        let written = fs::metadata(self.incoming().join(name)).and_then(|found| found.modified());
        written.unwrap_or_else(|error| panic!("{name}: {error}"))
    }
}

/// Every export of the truth: its time, name and share, in order.
fn exports(truth: &Value) -> Vec<(f64, String, Option<f64>)> {
    let mut all = Vec::new();
    for series in truth["series"].as_array().unwrap() {
        for volume in series["volumes"].as_array().unwrap() {
            for export in volume["exports"].as_array().unwrap() {
                let name = export["name"].as_str().unwrap().to_owned();
                let at_s = export["at_s"].as_f64().unwrap();
                all.push((at_s, name, export["kept_share"].as_f64()));
            }
        }
    }
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    all
}

/// The volumes that a fault hit, `(series, volume)`.
fn hits(truth: &Value, fault: &str) -> Vec<(u64, u64)> {
    let faults = truth["faults"].as_array().unwrap();
    let found = faults.iter().find(|found| found["fault"] == fault);
    let hits = found.unwrap_or_else(|| panic!("no {fault} in {faults:?}"))["hits"].as_array();
    hits.unwrap()
        .iter()
        .map(|hit| {
            let number = |name: &str| hit[name].as_u64().unwrap();
            (number("series"), number("volume"))
        })
        .collect()
}

fn contents(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let files = files_of(dir);
    let read = |path: &PathBuf| (name_of(path).to_owned(), fs::read(path).unwrap());
    files.iter().map(read).collect()
}

#[test]
fn the_same_seed_and_start_give_the_same_bytes() {
    let _turn = one_at_a_time();
    let run = |seed: &str| {
        let place = Place::new();
        place.simulated(&[
            "--speed",
            "1000",
            "--start",
            "2026-01-31T09:00:00",
            "--seed",
            seed,
            "--fault",
            "duplicate=10%",
            "--fault",
            "drop=10%",
            "--fault",
            "truncate=10%",
        ]);
        let truth = fs::read(place.0.path().join("truth/truth.json")).unwrap();
        (contents(&place.incoming()), truth)
    };
    let first = run("7");
    assert!(first.0.len() > 10);
    assert_eq!(first, run("7"));
    assert_ne!(first, run("8"));
}

#[test]
fn files_are_dropped_doubled_swapped_and_cut_as_the_truth_says() {
    let _turn = one_at_a_time();
    let place = Place::new();
    place.simulated(&[
        "--speed",
        "20",
        "--fault",
        "drop=3,7-8",
        "--fault",
        "duplicate=5",
        "--fault",
        "reorder=10",
        "--fault",
        "truncate=12",
    ]);
    let truth = place.truth();
    assert_eq!(hits(&truth, "drop"), [(1, 3), (1, 7), (1, 8)]);
    let exports = exports(&truth);
    // The folder holds what the truth lists and nothing else.
    let mut listed: Vec<&str> = exports.iter().map(|(_, name, _)| name.as_str()).collect();
    listed.sort_unstable();
    let found = files_of(&place.incoming());
    let found: Vec<&str> = found.iter().map(|path| name_of(path)).collect();
    assert_eq!(found, listed);
    assert_eq!(found.len(), 18);
    for gone in ["001_000003.dcm", "001_000007.dcm", "001_000008.dcm"] {
        assert!(!found.contains(&gone));
    }
    assert_eq!(
        place.file("001_000005.dcm"),
        place.file("again-001_000005.dcm")
    );
    let written = |name: &str| place.written(name);
    // The file system's clock ticks every few milliseconds: the two may have left within one tick,
    // but not a volume before its successor by the 50 ms of an export in its turn.
    assert!(written("001_000010.dcm") >= written("001_000011.dcm"));
    assert!(written("001_000010.dcm") < written("001_000012.dcm"));
    let whole = place.file("001_000011.dcm").len();
    let share = exports
        .iter()
        .find(|(_, name, _)| name == "001_000012.dcm")
        .unwrap()
        .2;
    #[expect(clippy::cast_precision_loss, reason = "a file's length")]
    let expected = whole as f64 * share.unwrap();
    #[expect(clippy::cast_precision_loss, reason = "a file's length")]
    let found = place.file("001_000012.dcm").len() as f64;
    assert!(
        (found - expected).abs() < 8.0,
        "{found} bytes, not {expected}"
    );
}

#[test]
fn exports_come_at_their_times_and_a_stall_lets_them_go_at_once() {
    let _turn = one_at_a_time();
    let place = Place::new();
    place.simulated(&["--speed", "10", "--fault", "stall=6:4.5"]);
    let exports = exports(&place.truth());
    assert_eq!(exports.len(), 20);
    let (first_s, first) = (exports[0].0, place.written(&exports[0].1));
    for (at_s, name, _) in &exports {
        let expected = Duration::from_secs_f64((at_s - first_s) / 10.0);
        let found = place.written(name).duration_since(first).unwrap();
        let apart = found.abs_diff(expected);
        assert!(
            apart < Duration::from_millis(60),
            "{name}: {found:?}, not {expected:?}"
        );
    }
    // Volume 6 is due after 6 s; volumes 7 to 10 are caught with it and leave at 10.5 s.
    let held = exports
        .iter()
        .filter(|(at_s, ..)| (at_s - 10.5).abs() < 1e-9);
    assert_eq!(held.count(), 5);
}

#[test]
fn an_abort_begins_a_new_series_and_a_twin_comes_beside_it() {
    let _turn = one_at_a_time();
    let place = Place::new();
    place.simulated(&[
        "--speed",
        "1000",
        "--fault",
        "abort=6:3",
        "--fault",
        "two-series",
    ]);
    let truth = place.truth();
    let series = truth["series"].as_array().unwrap();
    let roles: Vec<&str> = series.iter().map(|s| s["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["aborted", "run", "twin", "twin"]);
    let mut uids: Vec<&str> = series
        .iter()
        .map(|s| s["series_uid"].as_str().unwrap())
        .collect();
    for (index, uid) in uids.iter().enumerate() {
        let file = place.file(&format!("{:03}_000002.dcm", index + 1));
        assert!(file.windows(uid.len()).any(|part| part == uid.as_bytes()));
    }
    uids.sort_unstable();
    uids.dedup();
    assert_eq!(uids.len(), 4);
    let count = |prefix: &str| {
        let files = files_of(&place.incoming());
        files
            .iter()
            .filter(|path| name_of(path).starts_with(prefix))
            .count()
    };
    assert_eq!(
        [count("001_"), count("002_"), count("003_"), count("004_")],
        [6, 20, 6, 20]
    );
    // Six volumes, the pause.
    assert_eq!(series[1]["first_s"].as_f64(), Some(9.0));
}

#[test]
fn the_head_steps_and_the_header_clock_drifts() {
    let _turn = one_at_a_time();
    let place = Place::new();
    place.simulated(&[
        "--speed",
        "1000",
        "--motion",
        "still",
        "--start",
        "2026-01-31T09:00:00",
        "--fault",
        "motion-step=11:2",
        "--fault",
        "clock-drift=-500",
    ]);
    let truth = place.truth();
    let series = &truth["series"][0];
    let shift = |volume: usize| -> f64 {
        let matrix = &series["matrices_ras"][volume - 1];
        let squares = (0..3).map(|row| matrix[row][3].as_f64().unwrap().powi(2));
        squares.sum::<f64>().sqrt()
    };
    assert!(shift(10).abs() < 1e-12 && (shift(11) - 2.0).abs() < 1e-9);
    // The eleventh volume begins after 10 s, 5 ms less by the drifting clock.
    let time = series["volumes"][10]["header_time"].as_str().unwrap();
    assert_eq!(time, "2026-01-31T09:00:09.995000");
    let file = place.file("001_000011.dcm");
    assert!(file.windows(13).any(|part| part == b"090009.995000"));
}

#[test]
fn a_growing_file_holds_the_volumes_of_single_ones() {
    let _turn = one_at_a_time();
    let (single, growing) = (Place::new(), Place::new());
    let same = [
        "--speed",
        "1000",
        "--start",
        "2026-01-31T09:00:00",
        "--format",
    ];
    single.simulated(&[&same[..], &["nifti"]].concat());
    growing.simulated(&[&same[..], &["nifti4d"]].concat());
    let whole = growing.file("001.nii");
    assert_eq!(whole[40..50], [4, 0, 32, 0, 32, 0, 12, 0, 20, 0]);
    let len = 32 * 32 * 12 * 2;
    assert_eq!(whole.len(), 352 + 20 * len);
    for (volume, values) in (1..).zip(whole[352..].chunks_exact(len)) {
        let file = single.file(&format!("001_{volume:06}.nii"));
        assert_eq!(&file[352..], values, "volume {volume}");
    }
}

/// Runs once; checks every byte, returns how far the farthest is from its time.
fn pulses_apart() -> Duration {
    let place = Place::new();
    let link = place.0.path().join("trigger");
    let mut simulate = place.simulate(&[
        "--speed",
        "8",
        "--wait",
        "1.5",
        "--dummies",
        "3",
        "--pulse-byte",
        "115",
        "--fault",
        "lost-pulses=4",
        "--fault",
        "spurious-pulses=9",
        "--fault",
        "noise-bytes=11",
        "--pulses",
        link.to_str().unwrap(),
    ]);
    let mut child = simulate.stderr(Stdio::null()).spawn().unwrap();
    let began = Instant::now();
    let mut line = loop {
        match File::open(&link) {
            Ok(line) => break line,
            Err(error) => assert!(began.elapsed() < Duration::from_secs(20), "{error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let (mut found, mut byte) = (Vec::new(), [0]);
    // The line goes away with the scanner.
    while line.read(&mut byte).is_ok_and(|len| len == 1) {
        found.push((Instant::now(), byte[0]));
    }
    assert!(child.wait().unwrap().success());
    assert!(fs::symlink_metadata(&link).is_err(), "the link is left");

    let truth = place.truth();
    let pulses = truth["pulses"].as_array().unwrap();
    let count = |kind: &str| pulses.iter().filter(|pulse| pulse["kind"] == kind).count();
    assert_eq!(
        [
            count("dummy"),
            count("volume"),
            count("spurious"),
            count("noise")
        ],
        [3, 20, 1, 1]
    );
    let sent: Vec<&Value> = pulses
        .iter()
        .filter(|pulse| pulse["sent"] == true)
        .collect();
    assert_eq!(sent.len(), 24);
    assert_eq!(found.len(), sent.len());
    let mut apart_s: Vec<f64> = Vec::new();
    for (pulse, (moment, byte)) in sent.iter().zip(&found) {
        assert_eq!(pulse["byte"].as_u64(), Some(u64::from(*byte)));
        assert_eq!(pulse["kind"] == "noise", *byte != 115);
        let at_s = pulse["at_s"].as_f64().unwrap() / 8.0;
        apart_s.push((*moment - found[0].0).as_secs_f64() - at_s);
    }
    // Against the clock that most of them agree on: one that is late counts once.
    apart_s.sort_by(f64::total_cmp);
    let middle = apart_s[apart_s.len() / 2];
    let latest_s = apart_s.iter().map(|s| (s - middle).abs());
    Duration::from_secs_f64(latest_s.fold(0.0, f64::max))
}

#[test]
fn pulses_come_at_their_times_with_every_fault_of_the_line() {
    let _turn = one_at_a_time();
    // A machine that is busy at the wrong moment is asked again; a line that drifts never passes.
    let mut apart = (0..5).map(|_| pulses_apart());
    let passed = apart.find(|apart| {
        println!("pulses: {apart:?} from their times at most");
        *apart < PULSE_WITHIN
    });
    assert!(passed.is_some(), "not once within {PULSE_WITHIN:?}");
}

#[test]
fn files_of_another_folder_are_sent_again_with_faults() {
    let _turn = one_at_a_time();
    let (from, to) = (Place::new(), Place::new());
    from.simulated(&["--speed", "1000"]);
    let mut replay = command("afterimage");
    replay.args([
        "simulate", "--speed", "1000", "--fault", "drop=2", "--replay",
    ]);
    replay.arg(from.incoming()).arg("--into").arg(to.incoming());
    finish(replay).succeeded();
    let mut expected = contents(&from.incoming());
    expected.remove(1);
    assert_eq!(contents(&to.incoming()), expected);
}

/// dcmtk's receiver, gone with the test.
struct Receiver(Child);

impl Drop for Receiver {
    fn drop(&mut self) {
        // Gone already, most likely.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_receiver_that_nobody_here_wrote_takes_a_series() {
    let _turn = one_at_a_time();
    let place = Place::new();
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let mut storescp = Command::new("storescp");
    storescp
        .arg("-od")
        .arg(place.incoming())
        .args(["-aet", "BOX", &port.to_string()]);
    let storescp = storescp.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let Ok(storescp) = storescp else {
        println!("storescp (dcmtk) was not found, nothing is tested");
        return;
    };
    let _receiver = Receiver(storescp);
    let began = Instant::now();
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(
            began.elapsed() < Duration::from_secs(20),
            "storescp does not listen"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut simulate = command("afterimage");
    simulate
        .arg("simulate")
        .args(SMALL)
        .args(["--speed", "1000", "--called", "BOX"]);
    // The broken image costs its association and nothing else.
    simulate.args(["--fault", "drop=2", "--fault", "truncate=5", "--store"]);
    simulate.arg(format!("127.0.0.1:{port}"));
    let said = finish(simulate).succeeded().stderr;
    assert!(said.contains("the receiver refused 1 images"), "{said}");
    assert_eq!(files_of(&place.incoming()).len(), 18);
}

#[test]
fn a_wrong_request_is_refused_before_anything_is_written() {
    let place = Place::new();
    for (more, code, words) in [
        (
            &["--fault", "explode=1"][..],
            2,
            &["explode", "two-series"][..],
        ),
        (&["--fault", "drop=21"], 1, &["drop=21", "1 to 20"]),
        (&["--base", "/nowhere.nii"], 2, &["--base"]),
        (&["--motion", "file=/nowhere.tsv"], 1, &["/nowhere.tsv"]),
        (&["--pulses", "/nowhere/trigger"], 1, &["/nowhere/trigger"]),
    ] {
        finish(place.simulate(more)).refused(code, words);
        assert!(files_of(&place.incoming()).is_empty());
    }
    let mut nowhere = command("afterimage");
    nowhere.args(["simulate", "--volumes", "5", "--into", "/nowhere"]);
    finish(nowhere).refused(1, &["/nowhere"]);
}
