//! The role that shows: pages on loopback, fed by the other two.
//!
//! It holds the newest pictures and nothing else: no betas, no key, no stimulus, no patient.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use display::board::{Board, Kind, RoleState, SessionInfo, Shown};
use display::web;
use wire::{CaptionMessage, FromAcquire, FromDecode, PictureKind, PictureMessage, RoleName};

use crate::link::{Heard, subscribe};
use crate::roles::RoleError;
use crate::settings::Settings;
use crate::{acquire, decode};

/// What is known so far; the board is told when both halves are.
#[derive(Default)]
struct Known {
    session: Option<(String, String)>,
    model: Option<(String, bool, String)>,
    roles: BTreeMap<String, RoleState>,
    /// What was decoded in a session that was not announced yet; the two connections race.
    early: VecDeque<Decoded>,
}

/// What the decoder made of a trial.
enum Decoded {
    Picture(PictureMessage),
    Caption(CaptionMessage),
}

impl Decoded {
    fn session(&self) -> &str {
        match self {
            Decoded::Picture(picture) => &picture.session,
            Decoded::Caption(caption) => &caption.session,
        }
    }
}

/// Pictures and captions that wait for their session.
const MAX_EARLY: usize = 4 * display::board::MAX_TRIALS;

#[derive(Clone)]
struct Desk {
    board: Board,
    known: Arc<Mutex<Known>>,
}

impl Desk {
    fn learn(&self, learn: impl FnOnce(&mut Known)) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        learn(&mut known);
        if let Some((id, label)) = &known.session {
            let (bundle, random_weights) = match &known.model {
                Some((bundle, random, _)) => (bundle.clone(), *random),
                None => (String::new(), false),
            };
            let label = label.clone();
            self.board.session(SessionInfo {
                id: id.clone(),
                label,
                random_weights,
                bundle,
            });
        }
        self.board.roles(known.roles.clone());
    }

    fn role(&self, role: RoleName, state: RoleState) {
        self.learn(|known| {
            known.roles.insert(role.as_str().into(), state);
        });
    }

    fn decoded(&self, decoded: Decoded) {
        let fidelity = {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            let current = known.session.as_ref();
            if current.is_none_or(|(id, _)| id != decoded.session()) {
                // Of a session that is over, or about to be announced.
                known.early.push_back(decoded);
                if known.early.len() > MAX_EARLY {
                    known.early.pop_front();
                }
                return;
            }
            let model = known.model.as_ref();
            model
                .map(|(_, _, fidelity)| fidelity.clone())
                .unwrap_or_default()
        };
        match decoded {
            Decoded::Picture(picture) => self.picture(picture, fidelity),
            Decoded::Caption(caption) => {
                self.board.caption(caption.run, caption.trial, caption.text);
            }
        }
    }

    fn picture(&self, message: PictureMessage, fidelity: String) {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a duration in milliseconds; casts of floats saturate"
        )]
        let decoded_in_ms = message.took_ms as u32;
        let shown = Shown {
            run: message.run,
            trial: message.trial,
            kind: match message.kind {
                PictureKind::Blurry => Kind::Blurry,
                PictureKind::Unrefined => Kind::Unrefined,
                PictureKind::Refined => Kind::Refined,
            },
            tier: message.tier.as_str().into(),
            width: message.width,
            height: message.height,
            png: message.png,
            stimulus_at_ms: message.stimulus_at_ms,
            decoded_in_ms,
            seed: message.seed.to_string(),
            steps: message.steps,
            fidelity,
        };
        if let Err(error) = self.board.picture(shown) {
            tracing::warn!(%error, run = message.run, trial = message.trial, "picture not shown");
        }
    }

    fn hear_acquire(&self, heard: Heard<FromAcquire>) {
        match heard {
            Heard::Connected => self.role(RoleName::Acquire, RoleState::Up),
            Heard::Lost => self.role(RoleName::Acquire, RoleState::Down),
            Heard::Message(FromAcquire::Session(session)) => {
                let mut early = VecDeque::new();
                self.learn(|known| {
                    known.session = Some((session.id, session.label));
                    early = std::mem::take(&mut known.early);
                });
                // Those of another session find no place here.
                early.into_iter().for_each(|decoded| self.decoded(decoded));
            }
            Heard::Message(FromAcquire::RunStarted { run, tr_ms, .. }) => {
                self.board.run_started(run, tr_ms);
            }
            Heard::Message(FromAcquire::Volume { run, volume, .. }) => {
                self.board.volume(run, volume)
            }
            Heard::Message(FromAcquire::Fault { text }) => self.board.fault(text),
            // Betas are of no use here.
            Heard::Message(FromAcquire::Trial(_)) => {}
        }
    }

    fn hear_decode(&self, heard: Heard<FromDecode>) {
        match heard {
            Heard::Connected => self.role(RoleName::Decode, RoleState::Up),
            Heard::Lost => self.role(RoleName::Decode, RoleState::Down),
            Heard::Message(FromDecode::Model {
                bundle,
                random_weights,
                fidelity,
            }) => {
                self.learn(|known| known.model = Some((bundle, random_weights, fidelity)));
            }
            Heard::Message(FromDecode::Picture(picture)) => self.decoded(Decoded::Picture(picture)),
            Heard::Message(FromDecode::Caption(caption)) => self.decoded(Decoded::Caption(caption)),
            Heard::Message(FromDecode::Fault { text }) => self.board.fault(text),
        }
    }
}

/// Runs the role until `stop`.
///
/// # Errors
/// [`RoleError`] where the address cannot be bound or the pages cannot be served.
pub(crate) fn main(settings: &Settings, stop: &Arc<AtomicBool>) -> Result<(), RoleError> {
    let desk = Desk {
        board: Board::new(),
        known: Arc::default(),
    };
    desk.role(RoleName::Acquire, RoleState::Down);
    desk.role(RoleName::Decode, RoleState::Down);
    desk.role(RoleName::Show, RoleState::Up);
    let thread_error = |source| RoleError::Thread { source };
    let (acquire_desk, decode_desk) = (desk.clone(), desk.clone());
    let socket = |name: &str| settings.runtime_dir.join(name);
    subscribe(
        socket(acquire::SOCKET),
        RoleName::Show,
        "acquire",
        Arc::clone(stop),
        move |heard| {
            acquire_desk.hear_acquire(heard);
        },
    )
    .map_err(thread_error)?;
    subscribe(
        socket(decode::SOCKET),
        RoleName::Show,
        "decode",
        Arc::clone(stop),
        move |heard| {
            decode_desk.hear_decode(heard);
        },
    )
    .map_err(thread_error)?;

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(thread_error)?;
    let options = web::Options {
        hosts: settings.hosts.clone(),
        ..web::Options::default()
    };
    let (address, stopping) = (settings.listen, Arc::clone(stop));
    runtime.block_on(async move {
        let listener = tokio::net::TcpListener::bind(address)
            .await
            .map_err(|source| RoleError::Listen { address, source })?;
        crate::roles::ready();
        let stopped = async move {
            while !stopping.load(Ordering::Relaxed) {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        web::serve(listener, desk.board, options, stopped)
            .await
            .map_err(|source| RoleError::Serve { source })
    })
}
