//! A session's record, read by the program that wrote it.

use std::path::Path;

use serde_json::Value;

use crate::program::{Ended, run};

/// What `afterimage session show --json` says of a session.
///
/// # Panics
/// Where it says nothing.
#[track_caller]
pub fn show(session: &Path) -> Value {
    let ended = run("afterimage", &[&"session", &"show", &session, &"--json"]).succeeded();
    serde_json::from_str(&ended.stdout).unwrap()
}

/// A list of a report.
///
/// # Panics
/// Where there is none of that name.
#[track_caller]
pub fn list<'v>(value: &'v Value, name: &str) -> &'v [Value] {
    value[name]
        .as_array()
        .unwrap_or_else(|| panic!("no {name}"))
}

/// One number of each entry of a list.
///
/// # Panics
/// Where an entry has none of that name.
#[track_caller]
pub fn numbers(entries: &[Value], name: &str) -> Vec<u64> {
    let number = |entry: &Value| entry[name].as_u64().unwrap_or_else(|| panic!("no {name}"));
    entries.iter().map(number).collect()
}

/// Replays a session's betas.
pub fn replay(session: &Path) -> Ended {
    run("afterimage", &[&"replay", &session])
}
