//! `afterimage simulate`: a scanner to try things with.
//!
//! - [`arguments`]: what to simulate; its help is the manual;
//! - [`base`], [`motion`], [`shown`], [`response`], [`noise`]: the head, and what changes from volume
//!   to volume;
//! - [`render`]: one volume after the other;
//! - [`faults`], [`timeline`]: what happens when, decided before it begins;
//! - [`pace`], [`pulses`], [`output`], [`store`]: at its time, on its way;
//! - [`encode`], [`stamp`]: files with times in their headers;
//! - [`session`]: all of it together; [`head`]: its files alone, for `afterimage bench`;
//! - [`site`]: what a simulated site knows beforehand; [`truth`]: what was simulated.

mod arguments;
mod base;
mod encode;
mod faults;
mod head;
mod motion;
mod noise;
mod output;
mod pace;
mod pulses;
mod render;
mod response;
mod session;
mod shown;
mod site;
mod stamp;
mod store;
mod timeline;
mod truth;

#[cfg(test)]
mod tests;

use std::io::Write;
use std::process::ExitCode;

pub(crate) use arguments::{Arguments, sides};
pub(crate) use head::{HeadError, MovingHead};

use crate::logging::chain;

/// Runs the command.
pub(crate) fn main(arguments: &Arguments) -> ExitCode {
    match session::simulate(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}
