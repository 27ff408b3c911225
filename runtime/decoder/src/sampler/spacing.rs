//! Which timesteps a few-step run visits, as diffusers 0.31 spaces them.

use super::SamplerError;

/// Steps of the schedule that consistency models are distilled on.
const DISTILLED_STEPS: usize = 50;

/// From the noisiest timestep down, evenly: what Lightning, Turbo and Hyper were distilled for.
///
/// - `len`: timesteps of the schedule.
///
/// # Errors
/// [`SamplerError::Steps`] for none or more than the schedule has.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "timesteps are far below 2^52 and positive"
)]
pub fn trailing(len: usize, steps: usize) -> Result<Vec<usize>, SamplerError> {
    check(steps, len)?;
    let ratio = len as f64 / steps as f64;
    // numpy rounds halves to the even neighbour.
    let place = |index: usize| (len as f64 - index as f64 * ratio).round_ties_even() as usize;
    Ok((0..steps).map(|index| place(index) - 1).collect())
}

/// From `offset` up by whole strides, then turned round; the noisiest timestep is not visited.
///
/// # Errors
/// As [`trailing`].
pub fn leading(len: usize, steps: usize, offset: usize) -> Result<Vec<usize>, SamplerError> {
    check(steps, len)?;
    let stride = len / steps;
    let last = len - 1;
    Ok((0..steps)
        .rev()
        .map(|index| (index * stride + offset).min(last))
        .collect())
}

/// Every so many of the 50 steps that consistency models know, from the noisiest down.
///
/// - `strength`: share of the schedule that is run, 1 from pure noise; less for image to image.
///
/// # Errors
/// [`SamplerError::Steps`] for none or more than `50 * strength`.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "at most 50, and negative strengths become 0"
)]
pub fn distilled(len: usize, steps: usize, strength: f64) -> Result<Vec<usize>, SamplerError> {
    let thinned = DISTILLED_STEPS.min(len);
    let known = (thinned as f64 * strength.clamp(0.0, 1.0)) as usize;
    check(steps, known)?;
    let stride = len / thinned;
    Ok((0..steps)
        .map(|index| (known - index * known / steps) * stride - 1)
        .collect())
}

fn check(steps: usize, limit: usize) -> Result<(), SamplerError> {
    if steps == 0 || steps > limit {
        return Err(SamplerError::Steps { steps, limit });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spacings_are_those_of_diffusers() {
        assert_eq!(
            trailing(1000, 8).unwrap(),
            [999, 874, 749, 624, 499, 374, 249, 124]
        );
        assert_eq!(leading(1000, 4, 1).unwrap(), [751, 501, 251, 1]);
        assert_eq!(distilled(1000, 1, 1.0).unwrap(), [999]);
        assert_eq!(distilled(1000, 2, 1.0).unwrap(), [999, 499]);
        assert_eq!(distilled(1000, 4, 1.0).unwrap(), [999, 759, 499, 259]);
        assert_eq!(distilled(1000, 4, 0.6).unwrap(), [599, 459, 299, 159]);
        assert_eq!(
            distilled(1000, 8, 1.0).unwrap(),
            [999, 879, 759, 639, 499, 379, 259, 139]
        );
    }

    #[test]
    fn more_steps_than_there_are_is_refused() {
        assert!(trailing(1000, 0).is_err());
        assert!(trailing(1000, 1001).is_err());
        assert!(distilled(1000, 51, 1.0).is_err());
        assert!(distilled(1000, 31, 0.6).is_err());
    }
}
