//! The messages. None carries a patient's name or the UID of a series.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Changes whenever a message does; processes of different versions refuse each other.
pub const PROTOCOL: u32 = 4;

/// A role of the appliance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RoleName {
    /// Volumes, runs, betas, the session record.
    Acquire,
    /// One scanner file at a time.
    Parse,
    /// The bundle and the pictures.
    Decode,
    /// Pages and display.
    Show,
}

impl RoleName {
    /// The name in commands and messages.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            RoleName::Acquire => "acquire",
            RoleName::Parse => "parse",
            RoleName::Decode => "decode",
            RoleName::Show => "show",
        }
    }
}

impl fmt::Display for RoleName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// When after its onset a trial is decoded; each later time knows more volumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// As soon as the response peaks.
    Fast,
    /// When later volumes have improved the estimate.
    Slow,
    /// When the run is over.
    End,
}

impl Tier {
    /// Every tier, in the order of time.
    pub const ALL: [Tier; 3] = [Tier::Fast, Tier::Slow, Tier::End];

    /// The name in files, settings and addresses.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Tier::Fast => "fast",
            Tier::Slow => "slow",
            Tier::End => "end",
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The first message on every connection, from the one who connects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL`].
    pub protocol: u32,
    /// Who connects.
    pub role: RoleName,
}

/// The parser's answer to one file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ParseReply {
    /// The file holds this volume.
    Volume(VolumeMessage),
    /// The file holds this slice of a volume.
    Slice(SliceMessage),
    /// The bytes begin a NIfTI image.
    Image(ImageMessage),
    /// The file is refused; the text carries no header value.
    Refused {
        /// Why.
        reason: String,
    },
}

/// A volume on its way from the parser.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct VolumeMessage {
    /// `[slice, row, column]`.
    pub shape: [u32; 3],
    /// Row-major, scanner units.
    pub voxels: Vec<f32>,
    /// `(column, row, slice)` indices to patient LPS, millimetres.
    pub affine_lps: [[f64; 4]; 4],
    /// Hash of the series' UID; the UID itself stays in the parser.
    pub series: [u8; 16],
    /// Hash of the header's patient module: for comparing, never for showing.
    pub patient: u64,
    /// Number in the run, from 1.
    pub number: u32,
    /// Repetition time, milliseconds.
    pub tr_ms: f64,
    /// When its acquisition began by the scanner's clock, milliseconds since midnight.
    pub time_ms: Option<f64>,
    /// Each slice's time from the start of the volume, `[slice]`, milliseconds.
    pub slice_times_ms: Option<Vec<f32>>,
}

/// A slice on its way from the parser.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct SliceMessage {
    /// `[row, column]`.
    pub shape: [u32; 2],
    /// Row-major, scanner units.
    pub pixels: Vec<f32>,
    /// Where its first pixel lies, LPS, millimetres.
    pub position_lps: [f64; 3],
    /// The direction in which columns follow each other, LPS.
    pub columns_lps: [f64; 3],
    /// The direction in which rows follow each other, LPS.
    pub rows_lps: [f64; 3],
    /// Distances between rows and between columns, millimetres.
    pub pixel_mm: [f64; 2],
    /// Distance to the next slice as the header states it, millimetres.
    pub spacing_mm: Option<f64>,
    /// Hash of the series' UID; the UID itself stays in the parser.
    pub series: [u8; 16],
    /// Hash of the header's patient module: for comparing, never for showing.
    pub patient: u64,
    /// Number of its volume in the run, from 1.
    pub number: u32,
    /// Slices of a volume, where the header says so.
    pub slices: Option<u32>,
    /// Instance number, where the header has one.
    pub instance: Option<u32>,
    /// Repetition time, milliseconds.
    pub tr_ms: f64,
    /// When it was acquired by the scanner's clock, milliseconds since midnight.
    pub time_ms: Option<f64>,
    /// When it was acquired, milliseconds from a moment that is the same for the whole run.
    pub taken_ms: Option<f64>,
    /// Its place among the volume's slices as the scanner counts them, from 0.
    pub rank: Option<u32>,
    /// The order of acquisition by the protocol: whether interleaved, and the pause after a volume,
    /// milliseconds.
    pub order: Option<(bool, f64)>,
}

impl fmt::Debug for SliceMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SliceMessage")
            .field("shape", &self.shape)
            .field("number", &self.number)
            .field("tr_ms", &self.tr_ms)
            .finish_non_exhaustive()
    }
}

/// A NIfTI image as far as its bytes go.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageMessage {
    /// Volumes that the header states.
    pub volumes: u64,
    /// Where the first value stands in the file, not packed.
    pub start: u64,
    /// Bytes of one volume.
    pub volume_bytes: u64,
    /// The first volume, where the bytes hold it whole: of no series, with number 0 and, where the
    /// header has none, a TR of 0.
    pub volume: Option<VolumeMessage>,
}

impl fmt::Debug for VolumeMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VolumeMessage")
            .field("shape", &self.shape)
            .field("number", &self.number)
            .field("tr_ms", &self.tr_ms)
            .finish_non_exhaustive()
    }
}

/// What acquire tells decode and show.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromAcquire {
    /// The session in progress; first on every connection.
    Session(SessionMessage),
    /// A run began.
    RunStarted {
        /// Run within the session, from 1.
        run: u32,
        /// Repetition time, milliseconds.
        tr_ms: f64,
        /// Trials in the events file.
        trials: u32,
    },
    /// A volume is in.
    Volume {
        /// Run.
        run: u32,
        /// Volume, from 1.
        volume: u32,
        /// From the file's arrival to its masked voxels, milliseconds.
        took_ms: f64,
        /// What it shows.
        quality: VolumeQuality,
    },
    /// A trial's response is estimated.
    Trial(TrialMessage),
    /// Something an operator must know, as a sentence.
    Fault {
        /// The sentence.
        text: String,
    },
}

/// How good a volume is; changes are since the volume taken before it, `None` where there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VolumeQuality {
    /// Root mean square displacement of the head from the run's reference, millimetres.
    pub displacement_mm: f32,
    /// Framewise displacement (Power et al.), millimetres.
    pub fd_power_mm: Option<f32>,
    /// Framewise displacement (Jenkinson et al.), millimetres.
    pub fd_jenkinson_mm: Option<f32>,
    /// Slow displacement since the run began, millimetres.
    pub drift_mm: f32,
    /// Root mean square change of the mask's voxels, scanner units.
    pub dvars: Option<f32>,
    /// The same over its running median.
    pub dvars_standardised: Option<f32>,
    /// Median over the mask's voxels of mean over standard deviation so far.
    pub tsnr: Option<f32>,
    /// The head moved, or the signal changed, too far at once.
    pub spike: bool,
    /// The head has slowly gone too far.
    pub drifting: bool,
}

/// The session that everything belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionMessage {
    /// Folder name of the record.
    pub id: String,
    /// What the operator called it.
    pub label: String,
    /// Seed of all noise.
    pub seed: u64,
}

/// One trial, ready to decode.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct TrialMessage {
    /// Run, from 1.
    pub run: u32,
    /// Trial within the run, from 1.
    pub trial: u32,
    /// When it is decoded.
    pub tier: Tier,
    /// Onset in the run, seconds.
    pub onset_s: f64,
    /// When the stimulus appeared, Unix milliseconds, by the arrival of volumes.
    pub stimulus_at_ms: Option<u64>,
    /// Volumes the estimate uses.
    pub volumes: u32,
    /// Volumes missing among them.
    pub missing: u32,
    /// `[voxel]`, z-scored over the trials so far.
    pub zbetas: Vec<f32>,
}

impl fmt::Debug for TrialMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TrialMessage")
            .field("run", &self.run)
            .field("trial", &self.trial)
            .field("tier", &self.tier)
            .field("voxels", &self.zbetas.len())
            .finish_non_exhaustive()
    }
}

/// What decode tells show.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromDecode {
    /// The model that is loaded; first on every connection.
    Model {
        /// Short form of the bundle's digest, and its version.
        bundle: String,
        /// The weights are random: pictures show that the box works, nothing else.
        random_weights: bool,
        /// `reference` or `edge`.
        fidelity: String,
    },
    /// A picture is ready.
    Picture(PictureMessage),
    /// A trial's picture is described in words.
    Caption(CaptionMessage),
    /// A trial could not be decoded, as a sentence.
    Fault {
        /// The sentence.
        text: String,
    },
}

/// What the captioner says is in a trial's picture: read from the brain, not from the stimulus.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaptionMessage {
    /// The session it belongs to.
    pub session: String,
    /// Run, from 1.
    pub run: u32,
    /// Trial, from 1.
    pub trial: u32,
    /// When it was decoded.
    pub tier: Tier,
    /// The words.
    pub text: String,
}

/// Which of a trial's pictures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PictureKind {
    /// The low-level picture.
    Blurry,
    /// Before refinement.
    Unrefined,
    /// Refined, and blended with the low-level picture.
    Refined,
}

impl PictureKind {
    /// Every kind, in the order they are made.
    pub const ALL: [PictureKind; 3] = [
        PictureKind::Blurry,
        PictureKind::Unrefined,
        PictureKind::Refined,
    ];

    /// The name in files and addresses.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            PictureKind::Blurry => "blurry",
            PictureKind::Unrefined => "unrefined",
            PictureKind::Refined => "refined",
        }
    }
}

/// A picture with what made it.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct PictureMessage {
    /// The session it belongs to.
    pub session: String,
    /// Run, from 1.
    pub run: u32,
    /// Trial, from 1.
    pub trial: u32,
    /// When it was decoded.
    pub tier: Tier,
    /// Which picture.
    pub kind: PictureKind,
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// PNG file.
    pub png: Vec<u8>,
    /// When the stimulus appeared, Unix milliseconds.
    pub stimulus_at_ms: Option<u64>,
    /// From betas to this picture, milliseconds.
    pub took_ms: f64,
    /// Seed of the session.
    pub seed: u64,
    /// Network calls of the sampler.
    pub steps: u32,
}

impl fmt::Debug for PictureMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PictureMessage")
            .field("run", &self.run)
            .field("trial", &self.trial)
            .field("tier", &self.tier)
            .field("kind", &self.kind)
            .field("len_bytes", &self.png.len())
            .finish_non_exhaustive()
    }
}
