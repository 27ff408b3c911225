//! Which pictures of a pool a brain's embedding resembles most.
//!
//! [`PoolWriter`] makes the file, on the workstation; [`Pool`] maps it, on the box. [`similarities`]
//! and [`top`] are the plain way, for embeddings in memory.

mod layout;
mod pool;
mod sketch;
mod write;

pub use pool::{EncoderDigest, Hit, Pool};
pub use write::{PoolShape, PoolWriter};

use ndarray::{Array1, Array2, ArrayView2};

/// Why a pool cannot be read, asked or written.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// The file cannot be read.
    #[error("cannot read the pool")]
    Read(#[source] std::io::Error),
    /// The file cannot be written.
    #[error("cannot write the pool")]
    Write(#[source] std::io::Error),
    /// Something in it, or in the question, is not as it must be.
    #[error("{field}: expected {expected}, found {found}")]
    Field {
        /// What is wrong.
        field: String,
        /// What is allowed.
        expected: String,
        /// What is there.
        found: String,
    },
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "the target is single precision"
)]
fn narrow(value: f64) -> f32 {
    value as f32
}

/// Cosine similarities of flattened embeddings.
///
/// - `rows`: `[row, value]`.
/// - `columns`: `[column, value]`.
///
/// Returns `[row, column]`; a row of zeros resembles nothing.
#[must_use]
pub fn similarities(rows: ArrayView2<'_, f32>, columns: ArrayView2<'_, f32>) -> Array2<f32> {
    unit_rows(rows).dot(&unit_rows(columns).t())
}

fn unit_rows(values: ArrayView2<'_, f32>) -> Array2<f32> {
    let mut unit = values.to_owned();
    for mut row in unit.rows_mut() {
        let norm = row.dot(&row).sqrt();
        if norm > 0.0 {
            row /= norm;
        }
    }
    unit
}

/// The `count` most similar columns of one row, most similar first; of equals the first.
#[must_use]
pub fn top(similarities: &Array1<f32>, count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..similarities.len()).collect();
    order.sort_by(|&a, &b| similarities[b].total_cmp(&similarities[a]).then(a.cmp(&b)));
    order.truncate(count);
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn the_most_similar_comes_first() {
        let pool = array![[1.0_f32, 0.0], [0.6, 0.8], [0.0, -2.0]];
        let brain = array![[3.0_f32, 4.0]];
        let found = similarities(brain.view(), pool.view());
        assert_eq!(top(&found.row(0).to_owned(), 2), [1, 0]);
    }
}
