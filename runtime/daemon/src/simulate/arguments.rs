//! What to simulate, from the command line.

use std::path::PathBuf;
use std::str::FromStr;

use chrono::NaiveDateTime;
use clap::{Args, ValueEnum};

use super::base::Grid;
use super::encode::Format;
use super::faults::Fault;
use super::motion::Way;

/// Largest grid, voxels; the readers take no larger one.
const MAX_VOXELS: usize = 4 << 20;

/// Unit of a beta.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum BetasUnit {
    /// Height of the trial's regressor in scanner units
    Scanner,
    /// Height of the trial's regressor in per cent of the base at the voxel
    Percent,
}

/// Shape of the response.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum HrfName {
    /// Glover (1999)
    Glover,
    /// SPM's canonical response
    Spm,
}

/// Simulate a scanner: DICOM or NIfTI files or C-STORE, trigger pulses, faults on request
///
/// Each volume is a base (a synthetic head, or --base) plus the responses of each trial in a mask,
/// slow drift and the body's noise (smooth in space, autoregressive in time), moved rigidly, plus
/// Rician noise. What was simulated is written to truth.json (--truth, or the --site folder):
/// motion per volume, betas, every pulse and export with its time, every fault with the volumes
/// that it hit. The same seed and the same --start give the same bytes.
///
/// A site and a run of 12 trials, at twelve times the pace of a scanner:
///   afterimage simulate --prepare --site site
///   afterimage simulate --site site --into incoming --speed 12
///
/// A real head, 200 volumes, sent to a receiver, with pulses and faults:
///   afterimage simulate --base mean.nii.gz --volumes 200 --tr 1 --store 127.0.0.1:11112
///       --called AFTERIMAGE --pulses /tmp/trigger --dummies 3 --truth truth
///       --fault lost-pulses=1% --fault stall=60:5
#[derive(Args, Clone, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct Arguments {
    /// Folder of the simulated site: mask.nii, events.tsv, true_betas.npy
    #[arg(long, value_name = "DIR")]
    pub(super) site: Option<PathBuf>,
    /// Write the site's files and stop
    #[arg(long, requires = "site", conflicts_with_all = ["into", "store", "replay"])]
    pub(super) prepare: bool,
    /// Trials of the prepared site
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u32).range(1..=500))]
    pub(super) trials: u32,
    /// Voxels of the prepared mask
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(8..=20_000))]
    pub(super) voxels: u32,
    /// Send the files of this folder, in the order of their names, instead of simulated volumes
    #[arg(long, value_name = "DIR", conflicts_with_all = ["site", "base", "mask", "events", "betas"])]
    pub(super) replay: Option<PathBuf>,
    /// Seed of everything drawn
    #[arg(long, default_value_t = 1)]
    pub(super) seed: u64,

    /// The still head: one 3-D NIfTI volume, real or synthetic
    #[arg(long, value_name = "FILE", help_heading = "Head")]
    pub(super) base: Option<PathBuf>,
    /// Columns, rows and slices of the synthetic head
    #[arg(long, value_name = "CxRxS", default_value = "64x64x27", value_parser = sides,
        conflicts_with = "base", help_heading = "Head")]
    pub(super) grid: [usize; 3],
    /// Size of the synthetic head's voxels, millimetres
    #[arg(long, value_name = "XxYxZ", default_value = "3x3x3.5", value_parser = voxel_mm,
        conflicts_with = "base", help_heading = "Head")]
    pub(super) voxel_mm: [f64; 3],
    /// How the head moves: still, walk=MM (a random walk of that root mean square displacement),
    /// steps=MM:SECONDS (a jump every so often), or file=PATH (per volume and line six numbers:
    /// shifts along R, A, S in mm, turns about them in degrees)
    #[arg(long, default_value = "walk=0.3", value_parser = Way::from_str, help_heading = "Head")]
    pub(super) motion: Way,

    /// Voxels that respond, a NIfTI mask on the base's grid [default: SITE/mask.nii]
    #[arg(long, value_name = "FILE", help_heading = "Responses")]
    pub(super) mask: Option<PathBuf>,
    /// Stimuli, a BIDS events file [default: SITE/events.tsv]
    #[arg(long, value_name = "FILE", help_heading = "Responses")]
    pub(super) events: Option<PathBuf>,
    /// Betas [trial, voxel], .npy of float32 or float64
    /// [default: SITE/true_betas.npy, else standard normal numbers]
    #[arg(long, value_name = "FILE", help_heading = "Responses")]
    pub(super) betas: Option<PathBuf>,
    /// Unit of the betas
    #[arg(
        long,
        value_enum,
        default_value = "scanner",
        help_heading = "Responses"
    )]
    pub(super) betas_unit: BetasUnit,
    /// Multiplies the betas [default: 1 for --betas, else 25 scanner units or 2.5 per cent]
    #[arg(long, value_name = "FACTOR", value_parser = within(-1e4, 1e4),
        allow_negative_numbers = true, help_heading = "Responses")]
    pub(super) response: Option<f64>,
    /// Shape of the response
    #[arg(long, value_enum, default_value = "glover", help_heading = "Responses")]
    pub(super) hrf: HrfName,

    /// Mean over standard deviation of the head's voxels over time, both kinds of noise together
    #[arg(long, default_value_t = 200.0, value_parser = within(5.0, 1e6), help_heading = "Noise")]
    pub(super) tsnr: f64,
    /// Share of the noise's variance that is the body's
    #[arg(long, value_name = "SHARE", default_value_t = 0.3, value_parser = within(0.0, 1.0),
        help_heading = "Noise")]
    pub(super) body_share: f64,
    /// Correlation of the body's noise from one volume to the next
    #[arg(long, default_value_t = 0.4, value_parser = within(0.0, 0.95), help_heading = "Noise")]
    pub(super) ar1: f64,
    /// Smoothness of the body's noise, full width at half maximum, millimetres
    #[arg(long, value_name = "MM", default_value_t = 5.0, value_parser = within(0.0, 30.0),
        help_heading = "Noise")]
    pub(super) smooth_mm: f64,
    /// Largest drift, per cent of the brightness
    #[arg(long, value_name = "PERCENT", default_value_t = 0.5, value_parser = within(0.0, 20.0),
        help_heading = "Noise")]
    pub(super) drift: f64,

    /// The folder that the scanner exports into
    #[arg(long, value_name = "DIR", required_unless_present_any = ["prepare", "store"],
        conflicts_with = "store", help_heading = "Output")]
    pub(super) into: Option<PathBuf>,
    /// Send each volume by C-STORE to this receiver
    #[arg(long, value_name = "HOST:PORT", help_heading = "Output")]
    pub(super) store: Option<String>,
    /// The receiver's AE title
    #[arg(long, value_name = "AE", default_value = "AFTERIMAGE", value_parser = ae_title,
        help_heading = "Output")]
    pub(super) called: String,
    /// The scanner's AE title
    #[arg(long, value_name = "AE", default_value = "SIMULATOR", value_parser = ae_title,
        help_heading = "Output")]
    pub(super) calling: String,
    /// What is exported
    #[arg(long, value_enum, default_value = "mosaic", help_heading = "Output")]
    pub(super) format: Format,
    /// Folder for truth.json and truth_betas.npy [default: SITE]
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    pub(super) truth: Option<PathBuf>,
    /// Name a simulated person in the DICOM headers, SIMULATED^NAME; nobody is named otherwise
    #[arg(long, value_name = "NAME", value_parser = patient, help_heading = "Output")]
    pub(super) patient: Option<String>,

    /// Repetition time, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 1.5, value_parser = within(0.1, 20.0),
        help_heading = "Time")]
    pub(super) tr: f64,
    /// Volumes of the run [default: until 12 s after the last onset]
    #[arg(long, value_parser = clap::value_parser!(u32).range(3..=20_000), help_heading = "Time")]
    pub(super) volumes: Option<u32>,
    /// Times faster than real time
    #[arg(long, default_value_t = 1.0, value_parser = within(0.01, 1000.0), help_heading = "Time")]
    pub(super) speed: f64,
    /// What the scanner's clock shows at the start, as 2026-01-31T09:00:00 [default: now, UTC]
    #[arg(long, value_name = "TIME", help_heading = "Time")]
    pub(super) start: Option<NaiveDateTime>,
    /// Wait before the first pulse, seconds of real time
    #[arg(long, value_name = "SECONDS", default_value_t = 0.0, value_parser = within(0.0, 3600.0),
        help_heading = "Time")]
    pub(super) wait: f64,
    /// From the end of a volume's acquisition to its export, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 0.0, value_parser = within(0.0, 600.0),
        help_heading = "Time")]
    pub(super) export_delay: f64,

    /// Send a pulse at the start of each volume: a pseudo-terminal, linked at this path while the
    /// simulation lasts
    #[arg(long, value_name = "PATH", help_heading = "Pulses")]
    pub(super) pulses: Option<PathBuf>,
    /// The byte of a pulse, as a number; 53 is the character 5
    #[arg(
        long,
        value_name = "BYTE",
        default_value_t = b'5',
        help_heading = "Pulses"
    )]
    pub(super) pulse_byte: u8,
    /// Pulses before the first volume, one TR apart
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=100),
        help_heading = "Pulses")]
    pub(super) dummies: u32,

    /// Inject a fault; may be given more than once. Volumes are numbered from 1 as they are
    /// acquired, on over an abort; N% hits each with that probability, the same ones for a seed.
    ///
    ///   drop=3,7,20-22       volumes that are acquired and never exported (or drop=2%)
    ///   duplicate=5          volumes that are exported twice (or duplicate=1%)
    ///   reorder=9            volumes that are exported after their successor (or reorder=5%)
    ///   truncate=12          volumes whose file ends too early (or truncate=1%)
    ///   stall=30:5           nothing is exported for 5 s from volume 30 on, then all at once
    ///   abort=15             the series ends after volume 15; 5 s later (abort=15:20: 20 s) a new
    ///                        one begins from the start
    ///   two-series           every volume also comes in a second series
    ///   lost-pulses=1%       pulses that never come (or lost-pulses=4,8)
    ///   spurious-pulses=1%   pulses that begin no volume (or spurious-pulses=4,8)
    ///   noise-bytes=5%       other bytes on the pulse line (noise-bytes alone is 5%)
    ///   motion-step=40:1.5   the head lies 1.5 mm elsewhere from volume 40 on
    ///   clock-drift=200      the clock in the headers runs 200 millionths fast
    #[arg(long = "fault", value_name = "FAULT", value_parser = Fault::from_str,
        verbatim_doc_comment, help_heading = "Faults")]
    pub(super) faults: Vec<Fault>,
}

impl Arguments {
    /// The synthetic head's grid.
    pub(super) fn synthetic(&self) -> Grid {
        Grid {
            sides: self.grid,
            voxel_mm: self.voxel_mm,
        }
    }
}

/// A number within a range.
fn within(low: f64, high: f64) -> impl Fn(&str) -> Result<f64, String> + Clone {
    move |text| {
        let number: f64 = text.parse().map_err(|_| "expected a number".to_owned())?;
        if (low..=high).contains(&number) {
            Ok(number)
        } else {
            Err(format!("{number} is outside {low}..={high}"))
        }
    }
}

/// Three values with an x between.
fn three<T: FromStr>(text: &str) -> Option<[T; 3]> {
    let values: Option<Vec<T>> = text.split('x').map(|part| part.parse().ok()).collect();
    values?.try_into().ok()
}

/// Columns, rows and slices, as `64x64x27`.
pub(crate) fn sides(text: &str) -> Result<[usize; 3], String> {
    let expected = "expected three sides from 4 to 512, as 64x64x27, at most 4194304 voxels";
    three(text)
        .filter(|sides| sides.iter().all(|side| (4..=512).contains(side)))
        .filter(|sides| sides.iter().product::<usize>() <= MAX_VOXELS)
        .ok_or_else(|| expected.into())
}

fn voxel_mm(text: &str) -> Result<[f64; 3], String> {
    three(text)
        .filter(|sizes| sizes.iter().all(|size| (0.2..=20.0).contains(size)))
        .ok_or_else(|| "expected three sizes from 0.2 to 20, as 3x3x3.5".into())
}

fn ae_title(text: &str) -> Result<String, String> {
    let fits = (1..=16).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_graphic() || byte == b' ')
        && !text.contains('\\')
        && text.trim() == text;
    fits.then(|| text.to_owned())
        .ok_or_else(|| "expected 1 to 16 ASCII characters".into())
}

fn patient(text: &str) -> Result<String, String> {
    let fits =
        (1..=40).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric());
    fits.then(|| format!("SIMULATED^{text}"))
        .ok_or_else(|| "expected 1 to 40 letters and digits".into())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn parse(words: &str) -> Result<Arguments, String> {
        let words = std::iter::once("simulate").chain(words.split_whitespace());
        Line::try_parse_from(words)
            .map(|line| line.arguments)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn ways_to_call_it_that_are_promised_elsewhere_stay() {
        assert!(parse("--prepare --voxels 500 --trials 12 --site s").is_ok());
        assert!(parse("--speed 10 --voxels 500 --trials 12 --site s --into d").is_ok());
        assert!(parse("--replay r --into d --speed 3").is_ok());
        assert!(parse("--volumes 100 --store localhost:104 --called BOX").is_ok());
    }

    #[test]
    fn wrong_values_are_named_with_their_range() {
        for (words, said) in [
            ("--site s", "--into"),
            ("--into d --speed 5000", "5000 is outside 0.01..=1000"),
            ("--into d --speed nan", "NaN is outside"),
            ("--into d --tr 0", "0 is outside 0.1..=20"),
            ("--into d --grid 64x64", "as 64x64x27"),
            ("--into d --grid 512x512x512", "at most 4194304 voxels"),
            ("--into d --fault stall=3", "for example stall=30:5"),
            ("--into d --motion jump", "no motion"),
            ("--into d --patient A^B", "letters and digits"),
            ("--into d --store h:1", "cannot be used with"),
            ("--into d --start today", "--start"),
            ("--into d --pulse-byte 256", "--pulse-byte"),
            ("--into d --called ABCDEFGHIJKLMNOPQ", "1 to 16"),
            ("--prepare --into d", "--site"),
        ] {
            let error = parse(words).unwrap_err();
            assert!(error.contains(said), "{words}: {error}");
        }
    }

    #[test]
    fn help_teaches_each_fault() {
        use clap::CommandFactory;
        let help = Line::command().render_long_help().to_string();
        for fault in [
            "drop=3,7",
            "duplicate=5",
            "reorder=9",
            "truncate=12",
            "stall=30:5",
            "abort=15",
            "two-series",
            "lost-pulses=1%",
            "spurious-pulses=1%",
            "noise-bytes=5%",
            "motion-step=40:1.5",
            "clock-drift=200",
        ] {
            assert!(help.contains(fault), "{fault}");
            assert!(Fault::from_str(fault).is_ok(), "{fault}");
        }
    }
}
