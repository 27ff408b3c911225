//! Opening a bundle's networks by name and calling them for one output.

use bundle::{Bundle, StageName};
use ndarray::{ArrayD, IxDyn};

use crate::{DecodeError, LoadOptions, Runtime, Stage, StageError};

/// Opens networks of one bundle.
#[derive(Clone, Copy)]
pub(crate) struct Networks<'b> {
    pub(crate) runtime: &'b Runtime,
    pub(crate) bundle: &'b Bundle,
    pub(crate) options: &'b LoadOptions,
}

impl Networks<'_> {
    /// A network that the bundle may lack, or that is left out.
    pub(crate) fn find(self, name: StageName) -> Result<Option<Stage>, DecodeError> {
        if self.options.without.contains(&name) {
            return Ok(None);
        }
        let spec = self.bundle.manifest().stages.get(&name);
        let opened = spec.map(|spec| Stage::open(self.runtime, self.bundle, spec));
        opened.transpose().map_err(|source| DecodeError::Stage {
            stage: name.to_string(),
            source,
        })
    }

    /// A network that `needed_by` cannot do without.
    pub(crate) fn need(
        self,
        name: StageName,
        needed_by: &'static str,
    ) -> Result<Stage, DecodeError> {
        self.find(name)?.ok_or(DecodeError::Incomplete {
            missing: name.as_str(),
            needed_by,
        })
    }
}

/// One output of a network.
pub(crate) fn output(
    stage: &Stage,
    inputs: &[(&str, &ArrayD<f32>)],
    name: &str,
) -> Result<ArrayD<f32>, StageError> {
    let [values] = outputs(stage, inputs, [name])?;
    Ok(values)
}

/// Several outputs of a network, from one call.
pub(crate) fn outputs<const N: usize>(
    stage: &Stage,
    inputs: &[(&str, &ArrayD<f32>)],
    names: [&str; N],
) -> Result<[ArrayD<f32>; N], StageError> {
    let views: Vec<_> = inputs
        .iter()
        .map(|(name, values)| (*name, values.view()))
        .collect();
    let mut found = stage.run(&views)?;
    let taken = names.map(|name| found.remove(name));
    if let Some(at) = taken.iter().position(Option::is_none) {
        return Err(StageError::Interface {
            path: stage.spec().graph.clone().into(),
            expected: format!("output {}", names[at]),
            found: "none of that name".into(),
        });
    }
    Ok(taken.map(Option::unwrap_or_default))
}

/// One number as a network takes it, `[1]`.
pub(crate) fn scalar(value: f32) -> ArrayD<f32> {
    ArrayD::from_elem(IxDyn(&[1]), value)
}

/// A timestep as a network takes it, `[1]`.
#[expect(clippy::cast_precision_loss, reason = "timesteps are far below 2^24")]
pub(crate) fn timestep(time: usize) -> ArrayD<f32> {
    scalar(time as f32)
}

/// Predicted noise of a UNet.
///
/// - `latent`: `[1, channel, height, width]`, `context`: `[1, token, dim]`, `vector`: `[1, column]`.
pub(crate) fn eps(
    unet: &Stage,
    latent: &ArrayD<f32>,
    time: usize,
    context: &ArrayD<f32>,
    vector: &ArrayD<f32>,
) -> Result<ArrayD<f32>, StageError> {
    let time = timestep(time);
    let inputs = [
        ("latent", latent),
        ("timestep", &time),
        ("context", context),
        ("vector", vector),
    ];
    output(unet, &inputs, "eps")
}

/// A manifest's length as an index.
pub(crate) fn index(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}
