//! The role that owns the model: trials in, pictures out, each on record before it is told.
//!
//! The connection's thread fills a bounded list of waiting trials; the main thread decodes them one
//! after the other. A trial that is on record with the same betas is not decoded again, so a
//! restart costs nothing but loading.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bundle::PublicKey;
use decoder::{Decoder, Fidelity, NoiseKey, Picture, Progress, Runtime, Timings};
use display::png;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use wire::{
    CaptionMessage, FromAcquire, FromDecode, PictureKind, PictureMessage, RoleName, SessionMessage,
    Tier, TrialMessage,
};

use crate::link::{Heard, Keep, Publisher, subscribe, trial_key};
use crate::logging::chain;
use crate::memory;
use crate::record;
use crate::roles::RoleError;
use crate::settings::Settings;
use crate::{acquire, pipeline};

/// The socket's name in the runtime folder.
pub(crate) const SOCKET: &str = "decode.sock";
/// Trials that may wait; beyond that the oldest is given up, by name.
const MAX_WAITING: usize = 256;

/// What lies beside a picture.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct PictureFile {
    run: u32,
    trial: u32,
    tier: Tier,
    subject: String,
    pub(crate) fidelity: Fidelity,
    steps: u32,
    refiner_steps: u32,
    caption: Option<String>,
    noise: NoiseKey,
    /// Its digest.
    pub(crate) bundle: String,
    random_weights: bool,
    stimulus_at_ms: Option<u64>,
    decoded_at_ms: u64,
    timings: Timings,
    zbetas_sha256: String,
    software: String,
}

/// Trials that wait, with the session they belong to.
#[derive(Default)]
struct Waiting {
    session: Option<SessionMessage>,
    trials: VecDeque<TrialMessage>,
    dropped: Vec<(u32, u32, Tier)>,
}

impl Waiting {
    /// Takes a trial in; where too many wait, the oldest of the latest tier is given up: the early
    /// picture is what somebody waits for.
    fn push(&mut self, trial: TrialMessage) {
        self.trials.push_back(trial);
        if self.trials.len() <= MAX_WAITING {
            return;
        }
        let latest = self.trials.iter().map(|trial| trial.tier).max();
        let oldest = self
            .trials
            .iter()
            .position(|trial| Some(trial.tier) == latest);
        if let Some(given_up) = oldest.and_then(|place| self.trials.remove(place)) {
            self.dropped
                .push((given_up.run, given_up.trial, given_up.tier));
        }
    }

    /// The trial to decode next: the oldest of the earliest tier.
    fn pop(&mut self) -> Option<TrialMessage> {
        let earliest = self.trials.iter().map(|trial| trial.tier).min()?;
        let place = self
            .trials
            .iter()
            .position(|trial| trial.tier == earliest)?;
        self.trials.remove(place)
    }
}

type Inbox = Arc<(Mutex<Waiting>, Condvar)>;

/// Runs the role until `stop`.
///
/// # Errors
/// [`RoleError`] where the bundle, the key or ONNX Runtime cannot be used.
pub(crate) fn main(settings: &Settings, stop: &Arc<AtomicBool>) -> Result<(), RoleError> {
    let started = Instant::now();
    let key = PublicKey::from_file(&settings.key)?;
    let bundle = bundle::open(&settings.bundle)?.verify(&key)?;
    let (subject, without) = (&settings.subject, &settings.without);
    let needed = memory::check(
        bundle.manifest(),
        subject,
        without,
        settings.memory_limit_bytes,
    )?;
    if let Some(remark) = memory::remark(bundle.manifest().precision) {
        tracing::warn!(precision = %bundle.manifest().precision, remark, "bundle does not suit this board");
    }
    let bundle = bundle.without(&memory::stages_of(without));
    let library = decoder::runtime::find_library(settings.onnxruntime.as_deref())?;
    let runtime = Runtime::load(&library, settings.threads)?;
    let decoder = Decoder::load(&runtime, &bundle, &settings.subject, settings.fidelity)?;
    let manifest = bundle.manifest();
    let model = Model {
        digest: bundle.digest().to_owned(),
        random_weights: manifest.random_weights,
        subject: settings.subject.clone(),
        decoder,
    };
    tracing::info!(
        bundle = %model.digest,
        version = manifest.bundle_version,
        precision = %manifest.precision,
        needed_mib = needed >> 20,
        took_ms = started.elapsed().as_secs_f64() * 1e3,
        "bundle.verify"
    );
    for off in model.decoder.switched_off() {
        tracing::info!(feature = off.feature, lacks = %off.lacks, "the bundle cannot show this");
    }
    let publisher = Publisher::bind(&settings.runtime_dir.join(SOCKET), "decode", settings.queue)
        .map_err(|source| RoleError::Socket { source })?;
    let short: String = model.digest.chars().take(12).collect();
    let message = FromDecode::Model {
        bundle: format!("version {} ({short})", manifest.bundle_version),
        random_weights: model.random_weights,
        fidelity: fidelity_name(model.decoder.fidelity()).into(),
    };
    publisher.publish(&message, Keep::Under(0));
    let inbox = Inbox::default();
    listen(settings, &inbox, stop)?;
    crate::roles::ready();
    work(settings, &model, &publisher, &inbox, stop);
    Ok(())
}

/// The name in messages and notes.
pub(crate) fn fidelity_name(fidelity: Fidelity) -> &'static str {
    match fidelity {
        Fidelity::Reference => "reference",
        Fidelity::Edge => "edge",
    }
}

fn listen(settings: &Settings, inbox: &Inbox, stop: &Arc<AtomicBool>) -> Result<(), RoleError> {
    let filling = Arc::clone(inbox);
    subscribe(
        settings.runtime_dir.join(acquire::SOCKET),
        RoleName::Decode,
        "acquire",
        Arc::clone(stop),
        move |heard| {
            let (waiting, woken) = &*filling;
            let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
            match heard {
                Heard::Message(FromAcquire::Session(session)) => {
                    if waiting.session.as_ref() != Some(&session) {
                        waiting.trials.clear();
                    }
                    waiting.session = Some(session);
                }
                Heard::Message(FromAcquire::Trial(trial)) => {
                    waiting.push(trial);
                    woken.notify_one();
                }
                _ => {}
            }
        },
    )
    .map_err(|source| RoleError::Thread { source })
}

fn work(
    settings: &Settings,
    model: &Model,
    publisher: &Publisher,
    inbox: &Inbox,
    stop: &Arc<AtomicBool>,
) {
    let (waiting, woken) = &**inbox;
    let mut current = None;
    let mut recording = true;
    while !stop.load(Ordering::Relaxed) {
        let (session, trial, dropped) = {
            let guard = waiting.lock().unwrap_or_else(PoisonError::into_inner);
            let (mut guard, _) = woken
                .wait_timeout_while(guard, Duration::from_millis(200), |w| w.trials.is_empty())
                .unwrap_or_else(PoisonError::into_inner);
            let dropped = std::mem::take(&mut guard.dropped);
            let session = guard.session.clone();
            let trial = if session.is_some() { guard.pop() } else { None };
            (session, trial, dropped)
        };
        for (run, trial, tier) in dropped {
            fault(
                publisher,
                format!("Run {run}: trial {trial} was not decoded ({tier}), the box is behind"),
            );
        }
        let (Some(session), Some(trial)) = (session, trial) else {
            continue;
        };
        let folder = record::session_dir(&settings.state_dir, &session.id).join("pictures");
        if current.as_ref() != Some(&session.id) {
            publisher.forget_trials();
            current = Some(session.id.clone());
        }
        let (run, number) = (trial.run, trial.trial);
        match model.decode(&folder, &session, &trial, publisher) {
            Ok(()) => recording = true,
            Err(Undecoded::Failed(reason)) => {
                fault(
                    publisher,
                    format!("Run {run}: trial {number} has no picture: {reason}"),
                );
            }
            Err(Undecoded::Unrecorded(reason)) => {
                if std::mem::take(&mut recording) {
                    fault(
                        publisher,
                        format!(
                            "Run {run}: from trial {number} on, pictures are shown and not recorded: \
                             {reason}. Make room on the disk of paths.state"
                        ),
                    );
                }
            }
        }
    }
}

fn fault(publisher: &Publisher, text: String) {
    tracing::warn!(fault = %text, "fault");
    publisher.publish(&FromDecode::Fault { text }, Keep::No);
}

/// What went wrong with a trial.
enum Undecoded {
    /// It has no picture.
    Failed(String),
    /// It has, and the record has not.
    Unrecorded(String),
}

/// A loaded bundle.
struct Model {
    digest: String,
    random_weights: bool,
    subject: String,
    decoder: Decoder,
}

impl Model {
    fn decode(
        &self,
        folder: &Path,
        session: &SessionMessage,
        trial: &TrialMessage,
        publisher: &Publisher,
    ) -> Result<(), Undecoded> {
        let (run, number, tier) = (trial.run, trial.trial, trial.tier);
        let span = tracing::info_span!("trial.decode", run, trial = number, %tier);
        let _entered = span.enter();
        let started = Instant::now();
        // Where it cannot be created, nothing is recorded, and that is said below.
        let _ = record::create_private(folder);
        let hash = zbetas_sha256(&trial.zbetas);
        if self.tell_from_record(folder, session, trial, &hash, publisher) {
            tracing::info!("trial is on record, not decoded again");
            return Ok(());
        }
        let mut failed: Option<String> = None;
        let mut steps = 0;
        let mut present = |kind, picture: &Picture, steps: u32| {
            match self.message(session, trial, kind, picture, steps, started) {
                Ok(message) => {
                    let path = picture_path(folder, trial, kind);
                    // A full disk stops the recording and not the display.
                    let kept = record::write_whole(&path, &message.png);
                    let key = trial_key(trial.run, trial.trial, trial.tier, part(kind));
                    publisher.publish(&FromDecode::Picture(message), Keep::Under(key));
                    failed = failed.take().or(kept.err().map(|error| chain(&error)));
                }
                Err(error) => failed = Some(chain(&error)),
            }
        };
        let reconstruction =
            pipeline::decode_trial(&self.decoder, trial, session.seed, &mut |progress| {
                match progress {
                    Progress::Blurry(picture) => present(PictureKind::Blurry, picture, 0),
                    Progress::Step { sampler, of, .. } if sampler != "prior" => {
                        steps = u32::try_from(of).unwrap_or(u32::MAX);
                    }
                    Progress::Unrefined(picture) => {
                        present(PictureKind::Unrefined, picture, steps);
                    }
                    Progress::Caption(text) => tell_caption(session, trial, text, publisher),
                    Progress::Refined(picture) => present(PictureKind::Refined, picture, steps),
                    Progress::Step { .. } | Progress::Part { .. } => {}
                }
            })
            .map_err(|error| Undecoded::Failed(chain(&error)))?;
        if let Some(reason) = failed {
            return Err(Undecoded::Unrecorded(reason));
        }
        let file = PictureFile {
            run: trial.run,
            trial: trial.trial,
            tier: trial.tier,
            subject: self.subject.clone(),
            fidelity: self.decoder.fidelity(),
            steps: u32::try_from(reconstruction.steps).unwrap_or(u32::MAX),
            refiner_steps: u32::try_from(reconstruction.refiner_steps).unwrap_or(u32::MAX),
            caption: reconstruction.caption,
            noise: pipeline::noise_key(session.seed, trial),
            bundle: self.digest.clone(),
            random_weights: self.random_weights,
            stimulus_at_ms: trial.stimulus_at_ms,
            decoded_at_ms: record::now_ms(),
            timings: reconstruction.timings,
            zbetas_sha256: hash,
            software: env!("CARGO_PKG_VERSION").into(),
        };
        // Last: a trial with this file is whole.
        record::write_json(&note_path(folder, trial), &file)
            .map_err(|error| Undecoded::Unrecorded(chain(&error)))?;
        tracing::info!(
            took_ms = started.elapsed().as_secs_f64() * 1e3,
            "trial decoded"
        );
        Ok(())
    }

    fn message(
        &self,
        session: &SessionMessage,
        trial: &TrialMessage,
        kind: PictureKind,
        picture: &Picture,
        steps: u32,
        started: Instant,
    ) -> Result<PictureMessage, png::PngError> {
        let png = encode(
            picture,
            &self.digest,
            pipeline::noise_key(session.seed, trial),
            self.random_weights,
        )?;
        Ok(PictureMessage {
            session: session.id.clone(),
            run: trial.run,
            trial: trial.trial,
            tier: trial.tier,
            kind,
            width: picture.width,
            height: picture.height,
            png,
            stimulus_at_ms: trial.stimulus_at_ms,
            took_ms: started.elapsed().as_secs_f64() * 1e3,
            seed: session.seed,
            steps,
        })
    }

    /// Tells the pictures that are on record for exactly these betas; false where there are none.
    fn tell_from_record(
        &self,
        folder: &Path,
        session: &SessionMessage,
        trial: &TrialMessage,
        hash: &str,
        publisher: &Publisher,
    ) -> bool {
        let Some(file) = read_note(folder, trial) else {
            return false;
        };
        let same = file.zbetas_sha256 == hash
            && file.bundle == self.digest
            && file.fidelity == self.decoder.fidelity()
            && file.noise == pipeline::noise_key(session.seed, trial);
        if !same {
            return false;
        }
        for kind in PictureKind::ALL {
            let Ok(png) = fs::read(picture_path(folder, trial, kind)) else {
                continue;
            };
            let Ok((width, height)) = png::size(&png) else {
                return false;
            };
            let message = PictureMessage {
                session: session.id.clone(),
                run: trial.run,
                trial: trial.trial,
                tier: trial.tier,
                kind,
                width,
                height,
                png,
                stimulus_at_ms: trial.stimulus_at_ms,
                took_ms: file.timings.total_ms(),
                seed: session.seed,
                steps: match kind {
                    PictureKind::Refined => file.refiner_steps,
                    _ => file.steps,
                },
            };
            let key = trial_key(trial.run, trial.trial, trial.tier, part(kind));
            publisher.publish(&FromDecode::Picture(message), Keep::Under(key));
        }
        if let Some(text) = &file.caption {
            tell_caption(session, trial, text, publisher);
        }
        true
    }
}

/// What the publisher keeps a trial's messages under; pictures before the words about them.
fn part(kind: PictureKind) -> u8 {
    match kind {
        PictureKind::Blurry => 0,
        PictureKind::Unrefined => 1,
        PictureKind::Refined => 2,
    }
}

const CAPTION_PART: u8 = 3;

fn tell_caption(session: &SessionMessage, trial: &TrialMessage, text: &str, publisher: &Publisher) {
    let message = CaptionMessage {
        session: session.id.clone(),
        run: trial.run,
        trial: trial.trial,
        tier: trial.tier,
        text: text.into(),
    };
    let key = trial_key(trial.run, trial.trial, trial.tier, CAPTION_PART);
    publisher.publish(&FromDecode::Caption(message), Keep::Under(key));
}

/// A picture as PNG with what made it; equal inputs give equal bytes.
pub(crate) fn encode(
    picture: &Picture,
    digest: &str,
    key: NoiseKey,
    random_weights: bool,
) -> Result<Vec<u8>, png::PngError> {
    let software = concat!("Afterimage ", env!("CARGO_PKG_VERSION"));
    let weights = if random_weights {
        "; random weights"
    } else {
        ""
    };
    let comment = format!(
        "AI-generated reconstruction; bundle {digest}; seed {}; run {}; trial {}; {}{weights}",
        key.session_seed,
        key.run,
        key.trial,
        key.tier.as_str()
    );
    let text = [("Software", software), ("Comment", comment.as_str())];
    png::encode(picture.width, picture.height, &picture.rgb, &text)
}

/// What a trial's files begin with.
fn stem(trial: &TrialMessage) -> String {
    format!("run{:03}-trial{:03}-{}", trial.run, trial.trial, trial.tier)
}

/// What lies beside a trial's recorded pictures; `None` where the trial is not whole on record.
pub(crate) fn read_note(folder: &Path, trial: &TrialMessage) -> Option<PictureFile> {
    record::read_json(&note_path(folder, trial)).ok()
}

fn note_path(folder: &Path, trial: &TrialMessage) -> PathBuf {
    folder.join(format!("{}.json", stem(trial)))
}

/// Where a picture is recorded.
pub(crate) fn picture_path(folder: &Path, trial: &TrialMessage, kind: PictureKind) -> PathBuf {
    folder.join(format!("{}-{}.png", stem(trial), kind.as_str()))
}

/// SHA-256 of the betas as little-endian bytes, lower-case hex.
fn zbetas_sha256(zbetas: &[f32]) -> String {
    let mut hash = Sha256::new();
    for value in zbetas {
        hash.update(value.to_le_bytes());
    }
    hash.finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
