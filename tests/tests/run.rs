//! A whole run with the simulated scanner: volumes in, pictures out, a clean end.

use std::process::{Child, Stdio};

use serde_json::Value;
use system_tests::daemon::{Daemon, PATIENCE};
use system_tests::material::{TRIALS, phantom, signed};
use system_tests::numbers;
use system_tests::one_at_a_time;
use system_tests::program::{command, run};
use system_tests::scanner::Scanner;
use system_tests::site::Site;

/// Of true and estimated betas; the phantom's noise leaves about 0.8.
const LEAST_CORRELATION: f64 = 0.5;
/// The first trials are estimated from too few volumes.
const UNCERTAIN_TRIALS: usize = 2;

/// A child that does not outlive its test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // Already gone, most likely.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_simulated_run_shows_every_trial_and_ends_cleanly() {
    let _turn = one_at_a_time();
    let phantom = phantom();
    let site = Site::of_phantom(signed(), phantom);
    let mut daemon = Daemon::start(&site);

    let health: Value = serde_json::from_slice(&daemon.get("/healthz").body).unwrap();
    assert_eq!(health["status"], "ok");
    let page = daemon.get("/bedside");
    assert_eq!(page.status, 200);
    assert!(page.text().contains("AI-generated reconstruction"));
    assert!(daemon.events("\n\n").contains("event: state"));
    assert_eq!(daemon.get("/no-such-page").status, 404);

    let mut simulate = command("afterimage");
    simulate
        .args(["simulate", "--speed", "12", "--site"])
        .arg(&phantom.site)
        .arg("--into")
        .arg(site.scanner_folder());
    let mut scanner = Killed(simulate.stderr(Stdio::null()).spawn().unwrap());
    daemon.wait_for_trials(TRIALS);
    daemon.wait_for_notes(TRIALS);
    daemon.wait("the scanner's end", |_| scanner.0.try_wait().unwrap());

    let board = daemon.board();
    assert_eq!(board["session"]["random_weights"], true);
    assert_eq!(board["session"]["label"], "System test");
    daemon.check(
        daemon.faults().is_empty(),
        "a run without faults has faults",
    );
    let session = site.session();
    for trial in board["trials"].as_array().unwrap() {
        let number = trial["trial"].as_u64().unwrap();
        for picture in trial["kinds"].as_array().unwrap() {
            let shown = daemon.get(picture["url"].as_str().unwrap());
            assert!(shown.body.starts_with(b"\x89PNG"), "{}", shown.head);
            let name = format!(
                "run001-trial{number:03}-{}-{}.png",
                picture["tier"].as_str().unwrap(),
                picture["kind"].as_str().unwrap()
            );
            let recorded = std::fs::read(session.join("pictures").join(name)).unwrap();
            assert_eq!(shown.body, recorded);
        }
        let note = format!("pictures/run001-trial{number:03}-fast.json");
        let note: Value =
            serde_json::from_slice(&std::fs::read(session.join(note)).unwrap()).unwrap();
        assert_eq!(note["random_weights"], true);
    }

    let events = daemon.events("\n\n");
    assert!(events.contains("\"trial\":12"), "{events}");

    daemon.stop();
    let file: Value =
        serde_json::from_slice(&std::fs::read(session.join("session.json")).unwrap()).unwrap();
    let (began, ended) = (&file["started_at_ms"], &file["ended_at_ms"]);
    assert!(ended.as_u64().unwrap() > began.as_u64().unwrap(), "{file}");
    assert!(!site.state().join("current").exists());

    let found = numbers::read(&session.join("runs/001/fast-betas.npy"));
    let truth = numbers::read(&phantom.site.join("true_betas.npy"));
    let correlation = numbers::mean_correlation(&found, &truth, UNCERTAIN_TRIALS);
    println!("simulated run: betas and truth correlate by {correlation:.3}");
    assert!(correlation > LEAST_CORRELATION, "{correlation}");
}

#[test]
fn a_run_is_decoded_again_at_its_end_and_replays_byte_for_byte() {
    let _turn = one_at_a_time();
    let site = Site::of_phantom(signed(), phantom());
    let mut daemon = Daemon::start(&site);
    Scanner::new(&site.scanner_folder()).send_all(&phantom().files);
    let all: Vec<u32> = (1..=TRIALS).collect();
    daemon.wait("every trial's last picture on record", |daemon| {
        let recorded = daemon.recorded_as("end");
        let recorded: Vec<u32> = recorded.iter().map(|(trial, _)| *trial).collect();
        (recorded == all).then_some(())
    });
    assert!(!daemon.recorded_as("slow").is_empty());
    daemon.stop();

    let session = site.session();
    let arrays = |tier: &str| numbers::read(&session.join(format!("runs/001/{tier}-betas.npy")));
    let truth = numbers::read(&phantom().site.join("true_betas.npy"));
    let [early, late] =
        ["fast", "end"].map(|tier| numbers::mean_correlation(&arrays(tier), &truth, 0));
    println!("betas and truth correlate by {early:.3} early and {late:.3} at the end");
    assert!(late > early, "{late} is not better than {early}");

    let again = tempfile::tempdir().unwrap();
    let made = signed();
    let replay = |session: &std::path::Path| {
        run(
            "afterimage",
            &[
                &"replay",
                &session,
                &"--bundle",
                &made.bundle,
                &"--key",
                &made.keys.public,
                &"--out",
                &again.path(),
                &"--threads",
                &"1",
            ],
        )
    };
    let ended = replay(&session).succeeded();
    println!("{}", ended.stdout);
    assert!(ended.stdout.contains("0 skipped") && !ended.stdout.contains("differs"));
    let name = "pictures/run001-trial003-end-unrefined.png";
    let recorded = std::fs::read(session.join(name)).unwrap();
    assert_eq!(recorded, std::fs::read(again.path().join(name)).unwrap());

    // A record that was changed is found.
    let mut changed = recorded;
    let last = changed.len() - 20;
    changed[last] ^= 1;
    std::fs::write(session.join(name), changed).unwrap();
    let ended = replay(&session).refused(1, &[]);
    assert!(
        ended
            .stdout
            .contains("differs: run 1, trial 3, end: another unrefined picture"),
        "{}",
        ended.stdout
    );
}

#[test]
fn the_next_start_after_a_clean_end_is_another_session() {
    let _turn = one_at_a_time();
    let site = Site::of_phantom(signed(), phantom());
    for sessions in 1..=2 {
        let mut daemon = Daemon::start(&site);
        assert_eq!(site.sessions().len(), sessions);
        daemon.stop();
    }
}

#[test]
fn a_stop_during_start_is_a_clean_end_too() {
    let _turn = one_at_a_time();
    let site = Site::of_phantom(signed(), phantom());
    let mut daemon = Daemon::spawn(&site);
    daemon.wait("a role to start", |daemon| daemon.role("acquire"));
    daemon.stop();
    assert!(daemon.ended(PATIENCE).success());
}
