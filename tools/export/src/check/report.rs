//! The parity table: what was compared, how far apart, and whether that is near enough.

use std::io::Write;

use ndarray::ArrayViewD;
use serde::Serialize;

/// Smallest cosine that an fp16 bundle may have with the reference.
pub(crate) const HALF_COSINE: f64 = 0.9995;
/// Smallest peak signal-to-noise ratio of an fp16 bundle's pictures, in dB.
pub(crate) const HALF_PSNR_DB: f64 = 35.0;
/// Smallest cosine of an int8 bundle. One call of a UNet keeps 0.9993; a sampler feeds its own result
/// back and ends at 0.996 after twelve steps of a tiny refiner. The picture below decides.
const INTEGER_COSINE: f64 = 0.995;
/// Smallest peak signal-to-noise ratio of an int8 bundle's pictures: the usual threshold below which
/// people begin to see a difference.
const INTEGER_PSNR_DB: f64 = 30.0;

/// What decides in a precision whose rounding is its own: smallest cosine, smallest ratio in dB.
fn gate(precision: bundle::Precision) -> Option<(f64, f64)> {
    match precision {
        bundle::Precision::Fp32 => None,
        bundle::Precision::Fp16 => Some((HALF_COSINE, HALF_PSNR_DB)),
        bundle::Precision::Int8 => Some((INTEGER_COSINE, INTEGER_PSNR_DB)),
    }
}

/// How near a result must be to its reference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Tolerance {
    /// Every value equal.
    Exact,
    /// Largest difference as a share of the expected value, in every precision.
    Relative(f64),
    /// Largest difference in fp32; cosine in fp16 and int8.
    Close(f64),
    /// Like `Close`, for pictures in 0..1: in fp16 and int8 the signal-to-noise ratio decides.
    Picture(f64),
}

/// What became of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Within tolerance.
    Ok,
    /// Out of tolerance.
    Fail,
    /// Compared with something it need not equal: the note says with what.
    Measured,
    /// Nothing to compare: the note says why.
    NotInThisBundle,
}

/// One line of the table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// File of reference vectors, without `io_` and extension.
    pub vectors: String,
    /// What is compared.
    pub quantity: String,
    /// Largest absolute difference.
    pub max_error: Option<f64>,
    /// Largest difference allowed in this bundle's precision.
    pub tolerance: Option<f64>,
    /// Cosine with the reference.
    pub cosine: Option<f64>,
    /// Peak signal-to-noise ratio in dB, for pictures.
    pub psnr_db: Option<f64>,
    /// Wall time of the network calls.
    pub milliseconds: Option<f64>,
    /// Whether every intermediate was rounded to fp16.
    pub rounded: bool,
    /// The verdict.
    pub verdict: Verdict,
    /// Why there is nothing to compare, or what was compared with what.
    pub note: String,
}

impl Row {
    /// A row that has nothing to compare.
    #[must_use]
    pub fn absent(vectors: &str, note: impl Into<String>) -> Row {
        Row {
            vectors: vectors.into(),
            quantity: "-".into(),
            max_error: None,
            tolerance: None,
            cosine: None,
            psnr_db: None,
            milliseconds: None,
            rounded: false,
            verdict: Verdict::NotInThisBundle,
            note: note.into(),
        }
    }

    /// How far two results lie apart that need not be equal.
    #[must_use]
    pub fn measured(
        vectors: &str,
        quantity: &str,
        found: ArrayViewD<'_, f32>,
        beside: ArrayViewD<'_, f32>,
    ) -> Row {
        let any = Tolerance::Picture(f64::INFINITY);
        let row = Row::compare(
            vectors,
            quantity,
            found,
            beside,
            any,
            bundle::Precision::Fp32,
        );
        Row {
            tolerance: None,
            verdict: match row.verdict {
                Verdict::Ok => Verdict::Measured,
                other => other,
            },
            ..row
        }
    }

    /// Compares a result with its reference.
    #[must_use]
    pub fn compare(
        vectors: &str,
        quantity: &str,
        found: ArrayViewD<'_, f32>,
        expected: ArrayViewD<'_, f32>,
        tolerance: Tolerance,
        precision: bundle::Precision,
    ) -> Row {
        let mut row = Row {
            quantity: quantity.into(),
            note: String::new(),
            ..Row::absent(vectors, "")
        };
        if found.shape() != expected.shape() {
            row.verdict = Verdict::Fail;
            row.note = format!(
                "expected shape {:?}, found {:?}",
                expected.shape(),
                found.shape()
            );
            return row;
        }
        let distance = Distance::between(found, expected);
        row.max_error = Some(distance.max_error);
        row.cosine = Some(distance.cosine);
        let good = match (tolerance, gate(precision)) {
            (Tolerance::Exact, _) => {
                row.tolerance = Some(0.0);
                distance.max_error == 0.0
            }
            (Tolerance::Relative(limit), _) => {
                row.max_error = Some(distance.max_relative);
                row.tolerance = Some(limit);
                distance.max_relative <= limit
            }
            (Tolerance::Close(_), Some((cosine, _))) => distance.cosine >= cosine,
            (Tolerance::Picture(_), Some((_, psnr_db))) => distance.psnr_db >= psnr_db,
            (Tolerance::Close(limit) | Tolerance::Picture(limit), None) => {
                row.tolerance = Some(limit);
                distance.max_error <= limit
            }
        };
        if matches!(tolerance, Tolerance::Picture(_)) {
            row.psnr_db = Some(distance.psnr_db);
        }
        row.verdict = if good { Verdict::Ok } else { Verdict::Fail };
        row
    }

    /// The row with the time its network calls took.
    #[must_use]
    pub fn took(mut self, time: std::time::Duration) -> Row {
        self.milliseconds = Some(time.as_secs_f64() * 1e3);
        self
    }

    /// The row as out of tolerance for another reason than its numbers.
    #[must_use]
    pub fn failed(self, why: &str) -> Row {
        Row {
            verdict: Verdict::Fail,
            ..self.remark(why)
        }
    }

    /// The row with a remark.
    #[must_use]
    pub fn remark(mut self, note: &str) -> Row {
        self.note = note.into();
        self
    }
}

/// How far a result is from its reference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Distance {
    /// Largest absolute difference.
    pub(crate) max_error: f64,
    max_relative: f64,
    /// Cosine of the angle between the two.
    pub(crate) cosine: f64,
    /// Peak signal-to-noise ratio in dB, for values of 0..1.
    pub(crate) psnr_db: f64,
}

impl Distance {
    #[expect(
        clippy::cast_precision_loss,
        reason = "counts of values are far below 2^53"
    )]
    pub(crate) fn between(found: ArrayViewD<'_, f32>, expected: ArrayViewD<'_, f32>) -> Distance {
        let mut relative = 0.0_f64;
        let (mut largest, mut squares, mut dot, mut norm_found, mut norm_expected) =
            (0.0_f64, 0.0, 0.0, 0.0, 0.0);
        for (&found, &expected) in found.iter().zip(expected.iter()) {
            let (found, expected) = (f64::from(found), f64::from(expected));
            let error = (found - expected).abs();
            // NaN is as far away as can be.
            largest = if error.is_nan() {
                f64::INFINITY
            } else {
                largest.max(error)
            };
            let share = if error == 0.0 {
                0.0
            } else {
                error / expected.abs()
            };
            relative = if share.is_nan() {
                f64::INFINITY
            } else {
                relative.max(share)
            };
            squares += error * error;
            dot += found * expected;
            norm_found += found * found;
            norm_expected += expected * expected;
        }
        let norms = (norm_found * norm_expected).sqrt();
        let cosine = if norms > 0.0 {
            dot / norms
        } else {
            f64::from(u8::from(norm_found == norm_expected))
        };
        let mean_square = squares / expected.len().max(1) as f64;
        Distance {
            max_error: largest,
            max_relative: relative,
            cosine,
            psnr_db: -10.0 * mean_square.log10(),
        }
    }
}

/// A parity report.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The bundle's precision.
    pub precision: bundle::Precision,
    /// What computed: provider and arithmetic.
    pub arithmetic: String,
    /// The comparisons.
    pub rows: Vec<Row>,
    /// Each stage on its own.
    pub stages: Vec<super::StageFigures>,
}

impl Report {
    /// Whether something was compared and nothing was out of tolerance.
    #[must_use]
    pub fn passed(&self) -> bool {
        let any = |verdict| self.rows.iter().any(|row| row.verdict == verdict);
        any(Verdict::Ok) && !any(Verdict::Fail)
    }

    /// Writes the table as text.
    ///
    /// # Errors
    /// The writer's.
    pub fn print(&self, out: &mut dyn Write) -> std::io::Result<()> {
        writeln!(out, "{} bundle, {}", self.precision, self.arithmetic)?;
        writeln!(
            out,
            "{:<20} {:<30} {:>10} {:>10} {:>11} {:>8} {:>9}  verdict",
            "vectors", "quantity", "max error", "tolerance", "cosine", "PSNR dB", "ms"
        )?;
        let number = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.1e}"));
        for row in self
            .rows
            .iter()
            .filter(|row| row.verdict != Verdict::NotInThisBundle)
        {
            writeln!(
                out,
                "{:<20} {:<30} {:>10} {:>10} {:>11} {:>8} {:>9}  {}{}{}",
                row.vectors,
                row.quantity,
                number(row.max_error),
                number(row.tolerance),
                row.cosine
                    .map_or("-".into(), |cosine| format!("{cosine:.8}")),
                row.psnr_db.map_or("-".into(), |psnr| format!("{psnr:.1}")),
                row.milliseconds
                    .map_or("-".into(), |time| format!("{time:.1}")),
                match row.verdict {
                    Verdict::Ok => "ok",
                    Verdict::Measured => "measured",
                    _ => "OUT OF TOLERANCE",
                },
                if row.note.is_empty() { "" } else { ": " },
                row.note
            )?;
        }
        for row in self
            .rows
            .iter()
            .filter(|row| row.verdict == Verdict::NotInThisBundle)
        {
            writeln!(out, "{:<20} not in this bundle: {}", row.vectors, row.note)?;
        }
        if !self.stages.is_empty() {
            writeln!(
                out,
                "{:<28} {:>9} {:>9} {:>12} {:>12} {:>12}",
                "stage", "load ms", "call ms", "loaded MB", "after MB", "peak MB"
            )?;
        }
        for stage in &self.stages {
            writeln!(
                out,
                "{:<28} {:>9.1} {:>9.1} {:>12} {:>12} {:>12}",
                stage.stage,
                stage.load_milliseconds,
                stage.milliseconds,
                stage.loaded_anonymous_bytes / 1_000_000,
                stage.memory.anonymous_bytes / 1_000_000,
                stage.memory.peak_bytes / 1_000_000
            )?;
        }
        let count = |verdict| {
            self.rows
                .iter()
                .filter(|row| row.verdict == verdict)
                .count()
        };
        writeln!(
            out,
            "{} compared, {} out of tolerance, {} not in this bundle",
            count(Verdict::Ok) + count(Verdict::Fail),
            count(Verdict::Fail),
            count(Verdict::NotInThisBundle)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bundle::Precision;
    use ndarray::array;

    #[test]
    fn nan_is_out_of_every_tolerance() {
        let (found, expected) = (
            array![1.0, f32::NAN].into_dyn(),
            array![1.0_f32, 2.0].into_dyn(),
        );
        for precision in [Precision::Fp32, Precision::Fp16, Precision::Int8] {
            for tolerance in [
                Tolerance::Exact,
                Tolerance::Relative(1e9),
                Tolerance::Close(1e9),
                Tolerance::Picture(1e9),
            ] {
                let row = Row::compare(
                    "v",
                    "q",
                    found.view(),
                    expected.view(),
                    tolerance,
                    precision,
                );
                assert_eq!(row.verdict, Verdict::Fail, "{precision} {tolerance:?}");
            }
        }
    }

    #[test]
    fn report_of_nothing_compared_does_not_pass() {
        let rows = vec![Row::absent("legacy", "other checkpoint")];
        assert!(
            !Report {
                precision: Precision::Fp32,
                arithmetic: String::new(),
                rows,
                stages: Vec::new(),
            }
            .passed()
        );
    }

    #[test]
    fn other_shape_fails_and_is_named() {
        let (found, expected) = (array![1.0_f32].into_dyn(), array![[1.0_f32]].into_dyn());
        let row = Row::compare(
            "v",
            "q",
            found.view(),
            expected.view(),
            Tolerance::Close(1.0),
            Precision::Fp32,
        );
        assert_eq!(row.verdict, Verdict::Fail);
        assert!(row.note.contains("[1, 1]") && row.note.contains("[1]"));
    }
}
