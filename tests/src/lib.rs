//! Starts the built programs and watches them from outside; the tests themselves are in `tests/`.
//!
//! - [`program`]: finds the built programs and runs one to its end;
//! - [`material`]: checkpoints, bundles, keys and a simulated scanner's files, made once per process;
//! - [`site`]: a folder with everything one box needs, and its settings;
//! - [`daemon`]: `afterimage run` at such a site: its log, processes, pages and end;
//! - [`simulator`]: `afterimage simulate` beside a daemon;
//! - [`record`]: what a recorded session holds, as `afterimage session show` says it;
//! - [`scanner`]: files that arrive in the watched folder one after the other;
//! - [`numbers`]: arrays on disk and how alike they are.
//!
//! Nothing here links a crate of the workspace: hardware is imitated, our own code never.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

pub mod daemon;
pub mod material;
pub mod numbers;
pub mod program;
pub mod record;
pub mod scanner;
pub mod simulator;
pub mod site;

use std::sync::{Mutex, MutexGuard, PoisonError};

static TURN: Mutex<()> = Mutex::new(());

/// One heavy test of a process after the other: two cores hold one box each at a time.
///
/// A test that failed with the guard in its hands does not fail the others.
pub fn one_at_a_time() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}
