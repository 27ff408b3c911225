//! The front end's figures, as JSON and as tables.

use std::fmt;

use serde::Serialize;

use crate::bench::{Resident, Spread};

/// The front end's figures.
#[derive(Debug, Serialize)]
pub(in crate::bench) struct Figures {
    pub(super) software: &'static str,
    /// Processors of this machine.
    pub(super) processors: usize,
    pub(super) grids: Vec<GridFigures>,
    pub(super) fit: FitFigures,
    pub(super) triggers: Option<TriggerFigures>,
}

/// One grid's figures.
#[derive(Debug, Serialize)]
pub(super) struct GridFigures {
    /// Columns, rows, slices.
    pub(super) grid: [usize; 3],
    pub(super) voxel_mm: [f64; 3],
    pub(super) volumes: u32,
    pub(super) mask_voxels: usize,
    pub(super) file_bytes: u64,
    /// Where the files came from.
    pub(super) source: &'static str,
    /// The run's first volume made the reference, once.
    pub(super) reference_ms: f64,
    /// The furthest that the head was found from it.
    pub(super) moved_mm: f64,
    /// File in, masked voxels and quality out.
    pub(super) total: Spread,
    /// What both processes computed for that.
    pub(super) processor: Spread,
    pub(super) read: Spread,
    /// To the parser, there, and back as a volume.
    pub(super) parse: Spread,
    pub(super) realign: Spread,
    pub(super) sample: Spread,
    pub(super) quality: Spread,
    pub(super) first: WindowFigures,
    pub(super) last: WindowFigures,
}

/// Some volumes in a row, and memory after them.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct WindowFigures {
    pub(super) volumes: usize,
    pub(super) total: Spread,
    pub(super) processor: Spread,
    pub(super) resident: Resident,
    pub(super) parser_resident: Resident,
}

impl fmt::Display for WindowFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        #[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
        let megabytes = |resident: Resident| resident.anonymous as f64 / 1e6;
        write!(
            f,
            "median {:.3} ms, {:.3} ms of the processor; then {:.1} MB resident, the parser {:.1} MB",
            self.total.median_ms,
            self.processor.median_ms,
            megabytes(self.resident),
            megabytes(self.parser_resident)
        )
    }
}

/// A table's row.
fn row(f: &mut fmt::Formatter<'_>, name: &str, spread: Spread) -> fmt::Result {
    writeln!(f, "  {name:<34} {spread}")
}

impl fmt::Display for GridFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [columns, rows, slices] = self.grid;
        let [x, y, z] = self.voxel_mm;
        writeln!(
            f,
            "{columns}x{rows}x{slices}, voxels of {x:.2} x {y:.2} x {z:.2} mm, {} volumes, {} kB a file, {} \
             voxels of the mask; ms",
            self.volumes,
            self.file_bytes / 1000,
            self.mask_voxels
        )?;
        writeln!(
            f,
            "  {:<34} {:>10} {:>10} {:>10}",
            "", "median", "p99", "max"
        )?;
        row(f, "file read", self.read)?;
        row(f, "parser, there and back", self.parse)?;
        row(f, "realigned", self.realign)?;
        row(f, "sampled at the mask", self.sample)?;
        row(f, "judged", self.quality)?;
        row(f, "file in, voxels out", self.total)?;
        row(f, "  processor, both processes", self.processor)?;
        writeln!(f, "  first {} volumes: {}", self.first.volumes, self.first)?;
        writeln!(f, "  last {} volumes: {}", self.last.volumes, self.last)?;
        write!(
            f,
            "  the reference once {:.1} ms; the head was found up to {:.2} mm from it",
            self.reference_ms, self.moved_mm
        )
    }
}

/// One trial's fit.
#[derive(Debug, Serialize)]
pub(super) struct FitFigures {
    pub(super) volumes: usize,
    pub(super) voxels: usize,
    pub(super) trials: usize,
    pub(super) ols: Spread,
    pub(super) ols_processor: Spread,
    pub(super) ar1: Spread,
    pub(super) ar1_processor: Spread,
}

impl fmt::Display for FitFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "one trial's fit: {} volumes, {} voxels, {} trials; ms",
            self.volumes, self.voxels, self.trials
        )?;
        row(f, "OLS", self.ols)?;
        row(f, "  processor", self.ols_processor)?;
        row(f, "AR(1)", self.ar1)?;
        write!(f, "  {:<34} {}", "  processor", self.ar1_processor)
    }
}

/// How late stamps are.
#[derive(Debug, Serialize)]
pub(super) struct TriggerFigures {
    pub(super) pulses: usize,
    pub(super) busy_threads: u32,
    /// The stamping thread had FIFO scheduling.
    pub(super) fifo: bool,
    pub(super) late: Spread,
}

impl fmt::Display for TriggerFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheduling = if self.fifo { "FIFO" } else { "normal" };
        writeln!(
            f,
            "trigger stamps: {} pulses, {} busy threads, {scheduling} scheduling; ms",
            self.pulses, self.busy_threads
        )?;
        write!(f, "  {:<34} {}", "late", self.late)
    }
}
