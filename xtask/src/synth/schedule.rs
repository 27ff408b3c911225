//! The tables that a checkpoint carries beside its weights: real values, or nothing downstream makes sense.

/// The buffers of the diffusion prior's noise scheduler, in the order of its registration.
///
/// The schedule is the cosine one (Nichol and Dhariwal 2021) with `s = 0.008`, computed in f64 and rounded last.
pub(crate) fn prior_buffers(steps: u32) -> Vec<(&'static str, Vec<f32>)> {
    let level = |step: u32| {
        let angle =
            (f64::from(step) / f64::from(steps) + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2;
        angle.cos().powi(2)
    };
    let betas: Vec<f64> = (0..steps)
        .map(|step| {
            (1.0 - (level(step + 1) / level(0)) / (level(step) / level(0))).clamp(0.0, 0.999)
        })
        .collect();
    let alphas: Vec<f64> = betas.iter().map(|beta| 1.0 - beta).collect();
    let kept = cumulative_product(&alphas);
    let mut kept_before = vec![1.0];
    kept_before.extend_from_slice(&kept[..kept.len() - 1]);

    let table = |entry: &dyn Fn(usize) -> f64| -> Vec<f32> {
        (0..betas.len()).map(|step| round(entry(step))).collect()
    };
    let variance = |step: usize| betas[step] * (1.0 - kept_before[step]) / (1.0 - kept[step]);
    vec![
        ("betas", table(&|step| betas[step])),
        ("alphas_cumprod", table(&|step| kept[step])),
        ("alphas_cumprod_prev", table(&|step| kept_before[step])),
        ("sqrt_alphas_cumprod", table(&|step| kept[step].sqrt())),
        (
            "sqrt_one_minus_alphas_cumprod",
            table(&|step| (1.0 - kept[step]).sqrt()),
        ),
        (
            "log_one_minus_alphas_cumprod",
            table(&|step| (1.0 - kept[step]).ln()),
        ),
        (
            "sqrt_recip_alphas_cumprod",
            table(&|step| (1.0 / kept[step]).sqrt()),
        ),
        (
            "sqrt_recipm1_alphas_cumprod",
            table(&|step| (1.0 / kept[step] - 1.0).sqrt()),
        ),
        ("posterior_variance", table(&variance)),
        (
            "posterior_log_variance_clipped",
            table(&|step| variance(step).max(1e-20).ln()),
        ),
        (
            "posterior_mean_coef1",
            table(&|step| betas[step] * kept_before[step].sqrt() / (1.0 - kept[step])),
        ),
        (
            "posterior_mean_coef2",
            table(&|step| (1.0 - kept_before[step]) * alphas[step].sqrt() / (1.0 - kept[step])),
        ),
        ("p2_loss_weight", table(&|_| 1.0)),
    ]
}

/// The denoiser's sigmas, ascending: `sqrt((1 - a) / a)` of the square-root-linear beta schedule.
pub(crate) fn denoiser_sigmas(steps: u32, linear_start: f64, linear_end: f64) -> Vec<f32> {
    let (first, last) = (linear_start.sqrt(), linear_end.sqrt());
    let alphas: Vec<f64> = (0..steps)
        .map(|step| 1.0 - (first + (last - first) * f64::from(step) / f64::from(steps - 1)).powi(2))
        .collect();
    cumulative_product(&alphas)
        .into_iter()
        .map(|kept| round(((1.0 - kept) / kept).sqrt()))
        .collect()
}

/// The frequencies of a rotary embedding over `dim` channels, base 10,000.
pub(crate) fn rotary_frequencies(dim: u32) -> Vec<f32> {
    (0..dim / 2)
        .map(|pair| round(10_000_f64.powf(-f64::from(2 * pair) / f64::from(dim))))
        .collect()
}

fn cumulative_product(factors: &[f64]) -> Vec<f64> {
    factors
        .iter()
        .scan(1.0, |product, factor| {
            *product *= factor;
            Some(*product)
        })
        .collect()
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "rounding to f32 is the purpose"
)]
fn round(value: f64) -> f32 {
    value as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Relative, with a floor where the entry is tiny.
    fn close(found: f32, expected: f32) -> bool {
        (found - expected).abs() <= 2e-6 * expected.abs().max(1e-3)
    }

    #[test]
    fn prior_schedule_keeps_the_published_values() {
        // From `io_prior_schedule` of the reference vectors: steps 0, 50 and 99.
        let expected = include_str!("../../tests/data/prior_schedule.txt");
        let buffers = prior_buffers(100);
        let mut compared = 0;
        for line in expected.lines() {
            let mut fields = line.split(' ');
            let name = fields.next().unwrap();
            let (_, table) = buffers.iter().find(|(known, _)| *known == name).unwrap();
            assert_eq!(table.len(), 100);
            for field in fields {
                let (step, value) = field.split_once(':').unwrap();
                let found = table[step.parse::<usize>().unwrap()];
                assert!(
                    close(found, value.parse().unwrap()),
                    "{name} {field}: {found}"
                );
                compared += 1;
            }
        }
        assert_eq!(compared, 13 * 5);
    }

    #[test]
    fn sigmas_keep_the_published_values() {
        let expected = include_str!("../../tests/data/sigmas.txt");
        let table = denoiser_sigmas(
            1000,
            super::super::size::LINEAR_START,
            super::super::size::LINEAR_END,
        );
        assert_eq!(table.len(), 1000);
        for line in expected.lines() {
            let (step, value) = line.split_once(':').unwrap();
            let found = table[step.parse::<usize>().unwrap()];
            assert!(close(found, value.parse().unwrap()), "{line}: {found}");
        }
    }

    #[test]
    fn rotary_frequencies_fall_from_one() {
        let frequencies = rotary_frequencies(32);
        assert_eq!(frequencies.len(), 16);
        assert!(close(frequencies[0], 1.0));
        assert!(close(frequencies[1], 0.562_341_3));
        assert!(close(frequencies[15], 0.000_177_827_94));
    }
}
