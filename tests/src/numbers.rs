//! Arrays on disk and how alike they are.

use std::path::Path;

use ndarray::{Array2, ArrayView1};
use ndarray_npy::{read_npy, write_npy};

/// Reads `[row, column]`, f64 or f32.
///
/// # Panics
/// Where the file is not such an array.
pub fn read(path: &Path) -> Array2<f64> {
    read_npy::<_, Array2<f64>>(path)
        .or_else(|_| read_npy::<_, Array2<f32>>(path).map(|array| array.mapv(f64::from)))
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Writes `[row, column]` as f32.
///
/// # Panics
/// Where the file cannot be written.
pub fn write(path: &Path, array: &Array2<f32>) {
    write_npy(path, array).unwrap();
}

/// Betas that mean nothing, `[trial, voxel]`: between -1 and 1, the same every time.
pub fn some_betas(trials: usize, voxels: usize) -> Array2<f32> {
    let mut state = 0x2545_f491_u32;
    Array2::from_shape_simple_fn((trials, voxels), || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        f32::from(u8::try_from(state >> 24).unwrap()) / 127.5 - 1.0
    })
}

/// Pearson's correlation of two rows of equal length.
pub fn correlation(a: ArrayView1<'_, f64>, b: ArrayView1<'_, f64>) -> f64 {
    let (a, b) = (&a - a.mean().unwrap(), &b - b.mean().unwrap());
    (&a * &b).sum() / ((&a * &a).sum() * (&b * &b).sum()).sqrt()
}

/// Mean over rows of the correlation of the rows of two arrays of one shape.
///
/// # Panics
/// Where the shapes differ.
pub fn mean_correlation(found: &Array2<f64>, truth: &Array2<f64>, skip: usize) -> f64 {
    assert_eq!(found.dim(), truth.dim());
    let each: Vec<f64> = found
        .rows()
        .into_iter()
        .zip(truth.rows())
        .skip(skip)
        .map(|(found, truth)| correlation(found, truth))
        .collect();
    #[expect(clippy::cast_precision_loss, reason = "a few dozen trials")]
    let count = each.len() as f64;
    each.iter().sum::<f64>() / count
}
