//! The simulator against the front end: what was put in is found again.

use std::str::FromStr;

use clap::Parser;
use ndarray::{Array1, Array2, ArrayView1, s};
use rtfmri::assembly::{Added, Assembler, Limits};
use rtfmri::dicom::Image;
use rtfmri::events::Event;
use rtfmri::glm::{GlmSettings, Hrf, Noise, fit_trial, volumes_needed};
use rtfmri::volume::Affine;
use rtfmri::{Mask, Realigner, Rigid, Volume, dicom};

use super::arguments::Arguments;
use super::base::Base;
use super::motion::relative;
use super::session::Session;
use super::site;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    arguments: Arguments,
}

fn arguments(words: &[&str]) -> Arguments {
    let words = [
        "simulate",
        "--into",
        "nowhere",
        "--start",
        "2026-01-01T09:00:00",
    ]
    .iter()
    .chain(words);
    Line::parse_from(words).arguments
}

/// Every file, in the order in which it leaves.
fn files(session: &mut Session) -> Vec<Vec<u8>> {
    let deliveries = session.deliveries();
    let mut parcels = |delivery| session.parcels(delivery).unwrap();
    let all = deliveries.iter().flat_map(&mut parcels);
    all.map(|parcel| parcel.bytes).collect()
}

fn decoded(session: &mut Session) -> Vec<Volume> {
    let files = files(session);
    files
        .iter()
        .map(|file| dicom::decode_volume(file).unwrap())
        .collect()
}

/// Jenkinson's root mean square over a sphere of 50 mm about `centre`, millimetres.
fn error_mm(truth: &Affine, found: &Affine, centre: [f64; 3]) -> f64 {
    let apart = relative(found, truth);
    // `found` after undoing `truth` moves nothing where both are the same.
    let mut square = 0.0;
    for (row, numbers) in apart[..3].iter().enumerate() {
        let mut shift = numbers[3];
        for column in 0..3 {
            let still = if row == column { 1.0 } else { 0.0 };
            let change = numbers[column] - still;
            square += 50.0 * 50.0 / 5.0 * change * change;
            shift += change * centre[column];
        }
        square += shift * shift;
    }
    square.sqrt()
}

#[test]
fn motion_that_was_put_in_is_found_again() {
    for way in ["walk=1.2", "steps=1.5:8"] {
        let arguments = arguments(&["--volumes", "24", "--motion", way, "--seed", "3"]);
        let mut session = Session::of(&arguments).unwrap();
        let volumes = decoded(&mut session);
        let centre = session.truth.head.as_ref().unwrap().rotation_centre_ras_mm;
        let realigner = Realigner::new(&volumes[0]).unwrap();
        let (mut motion, mut sum, mut still) = (Rigid::identity(), 0.0, 0.0);
        for (volume, truth) in volumes.iter().zip(&session.truth.series[0].matrices_ras) {
            motion = realigner.realign(volume, &motion).unwrap();
            let error = error_mm(truth, &motion.matrix_ras(), centre);
            assert!(error < 0.05, "{way}: {error} mm");
            sum += error;
            still += error_mm(truth, &Rigid::identity().matrix_ras(), centre);
        }
        println!(
            "{way}: mean error {:.4} mm, unmoved {:.3} mm",
            sum / 24.0,
            still / 24.0
        );
        assert!(still / 24.0 > 0.3, "hardly anything moved");
    }
}

#[test]
fn betas_that_were_put_in_are_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let base = Base::synthetic(arguments(&[]).synthetic());
    site::prepare(dir.path(), &base, 9, 10, 120).unwrap();
    let place = dir.path().to_str().unwrap();
    let with_site = arguments(&["--site", place, "--motion", "still", "--seed", "9"]);
    let mut session = Session::of(&with_site).unwrap();
    let mask = Mask::from_nifti(&std::fs::read(dir.path().join("mask.nii")).unwrap()).unwrap();
    let volumes = decoded(&mut session);
    let mut series = Array2::zeros((volumes.len(), mask.len()));
    for (row, volume) in volumes.iter().enumerate() {
        series.row_mut(row).assign(&mask.sample(volume).unwrap());
    }
    let truth = session.betas.clone().unwrap().mapv(f64::from);
    let responses = session.truth.responses.as_ref().unwrap();
    let events: Vec<Event> = responses
        .events
        .iter()
        .map(|event| Event::new(event.onset, event.duration, event.trial_type.clone()))
        .collect();
    let settings = GlmSettings::new(1.5, Hrf::Glover, Noise::Ols);
    let mut found = Array1::zeros(events.len());
    for trial in 2..events.len() {
        let seen = volumes_needed(events[trial].onset_s, 1.5, settings.delay_s);
        let frames: Vec<usize> = (0..seen).collect();
        let seen = series.slice(s![..seen, ..]);
        let betas = fit_trial(&settings, &events, trial, &frames, seen, None).unwrap();
        found[trial] = correlation(betas.betas.view(), truth.row(trial));
    }
    let mean = found.slice(s![2..]).mean().unwrap();
    println!("betas and truth correlate by {mean:.3}");
    assert!(mean > 0.7, "{mean}");
    // In the unit they were put in: a slope of one, where noise does not get in the way.
    let quiet = arguments(&[
        "--site",
        place,
        "--motion",
        "still",
        "--tsnr",
        "100000",
        "--drift",
        "0",
        "--volumes",
        "60",
    ]);
    let mut session = Session::of(&quiet).unwrap();
    let volumes = decoded(&mut session);
    let peak = f64::from(session.truth.responses.as_ref().unwrap().peak_of_regressor);
    let first = mask.sample(&volumes[0]).unwrap();
    // Frame 11 is at 16.5 s: the first trial began at 12 s and peaks about then.
    let rise = mask.sample(&volumes[12]).unwrap() - &first;
    for (rise, beta) in rise.iter().zip(truth.row(0)) {
        let highest = beta.abs() * peak + 1.5;
        assert!(f64::from(rise.abs()) <= highest, "{rise} of {beta}");
    }
    let r = correlation(rise.mapv(f64::from).view(), truth.row(0));
    assert!(r > 0.99, "{r}");
}

fn correlation(a: ArrayView1<'_, f64>, b: ArrayView1<'_, f64>) -> f64 {
    let (a, b) = (&a - a.mean().unwrap(), &b - b.mean().unwrap());
    a.dot(&b) / (a.dot(&a) * b.dot(&b)).sqrt()
}

const SMALL: [&str; 6] = [
    "--grid",
    "24x24x12",
    "--voxel-mm",
    "8x8x8",
    "--volumes",
    "12",
];

#[test]
fn the_same_seed_and_start_give_the_same_bytes_and_others_do_not() {
    let run = |more: &[&str]| {
        let words: Vec<&str> = SMALL.iter().chain(more).copied().collect();
        files(&mut Session::of(&arguments(&words)).unwrap())
    };
    let first = run(&[]);
    assert_eq!(first, run(&[]));
    let other = run(&["--seed", "2"]);
    assert!(first.iter().zip(&other).all(|(a, b)| a != b));
    // A fault changes what it hits and nothing else.
    let dropped = run(&["--fault", "drop=4", "--fault", "duplicate=6"]);
    let mut expected = first;
    let again = expected[5].clone();
    expected.insert(6, again);
    expected.remove(3);
    assert_eq!(dropped, expected);
}

#[test]
fn noise_is_as_strong_as_it_was_asked_to_be() {
    let words = [
        "--grid",
        "32x32x14",
        "--voxel-mm",
        "6x6x7",
        "--volumes",
        "80",
        "--motion",
        "still",
        "--drift",
        "0",
        "--tsnr",
        "60",
    ];
    let mut session = Session::of(&arguments(&words)).unwrap();
    let volumes = decoded(&mut session);
    let mean = session.truth.head.as_ref().unwrap().brightness;
    let (mut ratio, mut voxels) = (0.0, 0.0);
    for (at, first) in volumes[0].voxels.indexed_iter() {
        let expected = f64::from(*first);
        // The ratio asked for is that of a voxel of mean brightness.
        if (expected - mean).abs() < 0.1 * mean {
            let series: Array1<f64> = volumes.iter().map(|v| f64::from(v.voxels[at])).collect();
            ratio += series.mean().unwrap() / series.std(1.0);
            voxels += 1.0;
        }
    }
    let found = ratio / voxels;
    assert!((found - 60.0).abs() < 4.0, "{found} over {voxels} voxels");
}

#[test]
fn what_does_not_fit_together_is_refused_by_name() {
    let refused = |words: &[&str]| match Session::of(&arguments(words)) {
        Ok(_) => panic!("{words:?} was accepted"),
        Err(error) => crate::logging::chain(&error),
    };
    for (words, said) in [
        (&[][..], "--volumes, --events or --site"),
        (&["--mask", "m"], "--mask needs --events"),
        (
            &["--volumes", "9", "--fault", "drop=10"],
            "volume from 1 to 9",
        ),
        (
            &["--volumes", "9", "--format", "nifti4d", "--fault", "drop=1"],
            "drop cannot be shown with --format nifti4d",
        ),
        (
            &["--volumes", "9", "--base", "/nowhere.nii"],
            "/nowhere.nii",
        ),
        (&["--volumes", "9", "--motion", "file=/nowhere"], "/nowhere"),
        (&["--replay", "/nowhere"], "/nowhere"),
    ] {
        let error = refused(words);
        assert!(error.contains(said), "{words:?}: {error}");
    }
}

#[test]
fn headers_tell_the_simulated_time_and_nobodys_name() {
    let words: Vec<&str> = SMALL
        .iter()
        .copied()
        .chain(["--fault", "clock-drift=1000", "--tr", "2"])
        .collect();
    let mut session = Session::of(&arguments(&words)).unwrap();
    let files = files(&mut session);
    let holds = |file: &[u8], word: &str| file.windows(word.len()).any(|w| w == word.as_bytes());
    // The sixth volume begins after 10 s, which this clock calls 10.01 s.
    assert!(holds(&files[5], "090010.010000"));
    assert!(!holds(&files[5], "SIMULATED^"));
    let time = &session.truth.series[0].volumes[5].header_time;
    assert_eq!(time, "2026-01-01T09:00:10.010000");
    let time = chrono::NaiveDateTime::from_str(time).unwrap();
    assert_eq!(time.and_utc().timestamp_subsec_millis(), 10);
    let named = SMALL.iter().copied().chain(["--patient", "NOBODY"]);
    let named: Vec<&str> = named.collect();
    let file = &self::files(&mut Session::of(&arguments(&named)).unwrap())[0];
    assert!(holds(file, "SIMULATED^NOBODY"));
}

#[test]
fn enhanced_files_hold_the_same_volumes_as_mosaics() {
    let run = |format: &str| {
        let words: Vec<&str> = SMALL.iter().copied().chain(["--format", format]).collect();
        decoded(&mut Session::of(&arguments(&words)).unwrap())
    };
    for (mosaic, xa) in run("mosaic").iter().zip(run("xa")) {
        assert_eq!(mosaic.voxels, xa.voxels);
        assert_eq!(mosaic.header.series_uid, xa.header.series_uid);
        assert_eq!(mosaic.header.acquisition, xa.header.acquisition);
        let (Some(a), Some(b)) = (mosaic.header.time_ms, xa.header.time_ms) else {
            panic!("a header says no time");
        };
        assert!((a - b).abs() < 0.01, "{a} and {b}");
        for (a, b) in mosaic
            .affine_lps
            .iter()
            .flatten()
            .zip(xa.affine_lps.iter().flatten())
        {
            assert!((a - b).abs() < 1e-3, "{a} and {b}");
        }
    }
}

#[test]
fn slices_of_both_vendors_hold_the_same_volumes_as_mosaics() {
    let files_of = |format: &str| {
        let words: Vec<&str> = SMALL.iter().copied().chain(["--format", format]).collect();
        files(&mut Session::of(&arguments(&words)).unwrap())
    };
    let mosaics = files_of("mosaic");
    for format in ["ge", "philips"] {
        let slices = files_of(format);
        assert_eq!(slices.len(), 12 * mosaics.len());
        let mut assembler = Assembler::new(Limits::default());
        let mut volumes = Vec::new();
        for slice in &slices {
            let Ok(Image::Slice(slice)) = dicom::decode(slice) else {
                panic!("{format}: no slice");
            };
            if let Added::Complete(volume) = assembler.add(slice).unwrap() {
                volumes.push(*volume);
            }
        }
        assert_eq!(volumes.len(), mosaics.len(), "{format}");
        for (mosaic, volume) in mosaics.iter().zip(&volumes) {
            let mosaic = dicom::decode_volume(mosaic).unwrap();
            assert_eq!(mosaic.voxels, volume.voxels, "{format}");
            assert_eq!(mosaic.header.series_uid, volume.header.series_uid);
            assert_eq!(mosaic.header.acquisition, volume.header.acquisition);
            assert!((mosaic.header.tr_ms - volume.header.tr_ms).abs() < 1e-6);
        }
    }
}
