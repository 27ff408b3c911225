//! The bedside picture on a browser page.
//!
//! [`png`] turns pixels into files and back, [`board`] holds the newest pictures in bounded memory,
//! and [`web`] serves them as a page that needs nothing from outside this machine:
//! `pixels → png::encode → Board::picture → event → page`.
//!
//! Nothing here knows a patient's name or which stimulus was shown; whoever fills the [`Board`]
//! keeps both out of its labels.

pub mod board;
pub mod png;
pub mod web;

pub use board::{Board, BoardError, Kind, RoleState, SessionInfo, Shown};
