//! What one browser is told: the newest state at once, then at every change, and a beat in between.

use std::time::Duration;

use axum::response::sse::Event;
use tokio::sync::{OwnedSemaphorePermit, watch};

use super::view;
use crate::board::Board;

/// How long a browser waits before it connects again.
const RETRY: Duration = Duration::from_secs(2);

/// One browser's place at the board.
///
/// It holds no queue: the next event is made when the browser can take it, from the state of that
/// moment.
pub(super) struct Watcher {
    board: Board,
    changes: watch::Receiver<()>,
    heartbeat: Duration,
    closing: Option<watch::Receiver<bool>>,
    greeted: bool,
    /// Given back when the browser goes.
    _place: OwnedSemaphorePermit,
}

impl Watcher {
    pub(super) fn new(
        board: Board,
        heartbeat: Duration,
        closing: Option<watch::Receiver<bool>>,
        place: OwnedSemaphorePermit,
    ) -> Self {
        Self {
            changes: board.changes(),
            board,
            heartbeat,
            closing,
            greeted: false,
            _place: place,
        }
    }

    /// The next event, or nothing once the server stops.
    pub(super) async fn next(&mut self) -> Option<Event> {
        if !self.greeted {
            self.greeted = true;
            self.changes.mark_unchanged();
            return Some(state(&self.board).retry(RETRY));
        }
        tokio::select! {
            biased;
            () = stop(&self.closing) => None,
            // The board in this watcher keeps the sender, so the only outcome is a change.
            _ = self.changes.changed() => Some(state(&self.board)),
            () = tokio::time::sleep(self.heartbeat) => Some(beat()),
        }
    }
}

async fn stop(closing: &Option<watch::Receiver<bool>>) {
    match closing {
        Some(closing) => closed(closing.clone()).await,
        None => std::future::pending().await,
    }
}

/// Ends when the server is to stop or is gone.
pub(super) async fn closed(mut closing: watch::Receiver<bool>) {
    // An error says that the server is gone, which ends the wait as well.
    let _ = closing.wait_for(|closing| *closing).await;
}

fn state(board: &Board) -> Event {
    let newest = view::newest(board);
    Event::default()
        .event("state")
        .id(newest.revision.to_string())
        .data(json(&newest))
}

fn beat() -> Event {
    Event::default().event("beat").data(json(&view::beat()))
}

fn json(value: &impl serde::Serialize) -> String {
    // Structs of numbers and text, with text keys only: there is nothing that could fail.
    serde_json::to_string(value).expect("a view of the board is JSON")
}
