//! Tensors of a pickle, compared with the storages that the file has.

use std::collections::BTreeMap;

use super::super::pickle::TensorValue;
use super::super::storage::Storage;
use super::super::tensor::View;
use super::Unpickled;

/// Finds the storages of tensors.
pub(in crate::checkpoint) struct Placer<'u> {
    unpickled: &'u Unpickled,
    /// Those that were found, in the order they were asked for.
    pub(in crate::checkpoint) storages: Vec<Storage>,
    by_key: BTreeMap<&'u str, usize>,
}

impl<'u> Placer<'u> {
    pub(in crate::checkpoint) fn new(unpickled: &'u Unpickled) -> Placer<'u> {
        Placer {
            unpickled,
            storages: Vec::new(),
            by_key: BTreeMap::new(),
        }
    }

    fn storage(&mut self, key: &str) -> Option<usize> {
        if let Some(&at) = self.by_key.get(key) {
            return Some(at);
        }
        let (key, found) = self.unpickled.lookup.get_key_value(key)?;
        self.storages.push(found.clone());
        self.by_key.insert(key, self.storages.len() - 1);
        Some(self.storages.len() - 1)
    }

    /// Compares a tensor with its storage; what is wrong as text.
    pub(in crate::checkpoint) fn place(&mut self, tensor: &TensorValue) -> Result<View, String> {
        let TensorValue {
            storage,
            offset,
            shape,
            strides,
        } = tensor;
        let Some(at) = self.storage(&storage.key) else {
            return Err(format!(
                "expected its numbers in storage {}, which is missing from the file",
                storage.key
            ));
        };
        let size = storage.dtype.len_bytes();
        let found = self.storages[at].len_bytes;
        if storage.elements.checked_mul(size) != Some(found) {
            return Err(format!(
                "expected {} elements of {size} bytes in {}, found {found} bytes",
                storage.elements, self.storages[at].entry
            ));
        }
        let reach = || {
            let mut last = *offset;
            for (&len, &stride) in shape.iter().zip(strides) {
                if len == 0 {
                    return Some(0);
                }
                last = last.checked_add((len - 1).checked_mul(stride)?)?;
            }
            last.checked_add(1)
        };
        let elements = shape
            .iter()
            .try_fold(1_u64, |product, &len| product.checked_mul(len));
        match (reach(), elements) {
            // A view that repeats elements (stride 0) could claim more numbers than any file holds.
            (Some(reach), Some(elements))
                if reach <= storage.elements
                    && elements <= storage.elements.saturating_mul(4096) => {}
            _ => {
                return Err(format!(
                    "expected a view within {} elements, found shape {shape:?}, strides {strides:?}, offset {offset}",
                    storage.elements
                ));
            }
        }
        Ok(View {
            dtype: storage.dtype,
            shape: shape.clone(),
            strides: strides.clone(),
            offset: *offset,
            storage: at,
        })
    }
}
