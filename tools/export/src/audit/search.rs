//! A small part of a list that suffices, found by leaving pieces out.
//!
//! Zeller and Hildebrandt's ddmin (2002), the half that removes: halves, quarters, … down to single
//! items. What is left suffices; where the budget lasts, no single item of it can be spared.

/// Leaves out of `all` whatever can be spared; `suffices` is asked at most `budget` times.
///
/// # Errors
/// Those of `suffices`.
pub(super) fn smallest<T: Clone, E>(
    all: Vec<T>,
    budget: usize,
    suffices: &mut dyn FnMut(&[T]) -> Result<bool, E>,
) -> Result<Vec<T>, E> {
    let mut kept = all;
    let mut asked = 0;
    let mut piece = kept.len().div_ceil(2);
    while piece > 0 && kept.len() > 1 {
        let mut start = 0;
        while start < kept.len() {
            if asked >= budget {
                return Ok(kept);
            }
            asked += 1;
            let end = (start + piece).min(kept.len());
            let rest = [&kept[..start], &kept[end..]].concat();
            if suffices(&rest)? {
                kept = rest;
            } else {
                start = end;
            }
        }
        piece = if piece == 1 { 0 } else { piece.div_ceil(2) };
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn nothing_can_be_spared_of_what_is_left(needed in proptest::collection::btree_set(0_usize..200, 1..6)) {
            let mut holds = |part: &[usize]| {
                Ok::<_, std::convert::Infallible>(needed.iter().all(|item| part.contains(item)))
            };
            let found = smallest((0..200).collect(), 10_000, &mut holds).unwrap();
            prop_assert_eq!(found, needed.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_spent_budget_leaves_what_suffices() {
        let mut asked = 0;
        let mut holds = |part: &[usize]| {
            asked += 1;
            Ok::<_, std::convert::Infallible>(part.contains(&7))
        };
        let found = smallest((0..100).collect(), 3, &mut holds).unwrap();
        assert!(found.contains(&7) && found.len() < 100);
        assert_eq!(asked, 3);
    }
}
