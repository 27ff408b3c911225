//! The names that diffusers gives to the parts of sgm's UNet, read off the UNet's own structure.
//!
//! sgm numbers blocks through; diffusers groups them into levels, which end where a block changes
//! the size. Residual blocks, transformers and changes of size are told by their keys.

use crate::section::Section;

/// A module of the UNet under both names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Module {
    /// sgm's path.
    sgm: String,
    /// diffusers' path.
    diffusers: String,
    /// A residual block, whose layers have other names too.
    residual: bool,
}

/// Layers of a residual block.
const RESIDUAL: [(&str, &str); 6] = [
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
];

/// What stands outside the blocks.
const OUTSIDE: [(&str, &str); 7] = [
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("label_emb.0.0", "add_embedding.linear_1"),
    ("label_emb.0.2", "add_embedding.linear_2"),
];

/// All modules of the UNet below `prefix`.
pub(super) fn modules(section: &Section<'_>, prefix: &str) -> Vec<Module> {
    let mut modules: Vec<Module> = OUTSIDE
        .iter()
        .map(|(sgm, diffusers)| Module {
            sgm: (*sgm).into(),
            diffusers: (*diffusers).into(),
            residual: false,
        })
        .collect();
    for (blocks, levels) in [
        ("input_blocks", "down_blocks"),
        ("output_blocks", "up_blocks"),
    ] {
        let mut level = Level::default();
        for block in section.numbers(&format!("{prefix}{blocks}.")) {
            if blocks == "input_blocks" && block == 0 {
                continue;
            }
            let into = format!("{levels}.{}", level.number);
            let path = format!("{blocks}.{block}.");
            if level.walk(section, prefix, &path, &into, &mut modules) {
                level = Level {
                    number: level.number + 1,
                    ..Level::default()
                };
            }
        }
    }
    Level::default().walk(section, prefix, "middle_block.", "mid_block", &mut modules);
    modules
}

/// The path of a layer in diffusers' names.
pub(super) fn diffusers(modules: &[Module], path: &str) -> Option<String> {
    modules.iter().find_map(|module| {
        let rest = path.strip_prefix(&module.sgm)?;
        if rest.is_empty() {
            return Some(module.diffusers.clone());
        }
        let rest = rest.strip_prefix('.')?;
        let rest = if module.residual {
            RESIDUAL.iter().find(|(sgm, _)| *sgm == rest)?.1
        } else {
            rest
        };
        Some(format!("{}.{rest}", module.diffusers))
    })
}

/// Where a walk through the blocks stands.
#[derive(Default)]
struct Level {
    number: u64,
    resnets: u64,
    attentions: u64,
}

impl Level {
    /// Names the modules of one block; true where it changes the size, which ends the level.
    fn walk(
        &mut self,
        section: &Section<'_>,
        prefix: &str,
        path: &str,
        into: &str,
        modules: &mut Vec<Module>,
    ) -> bool {
        let mut ends = false;
        for number in section.numbers(&format!("{prefix}{path}")) {
            let sgm = format!("{path}{number}");
            let has = |below: &str| section.has_prefix(&format!("{prefix}{sgm}.{below}"));
            let mut add = |sgm: String, diffusers: String, residual| {
                modules.push(Module {
                    sgm,
                    diffusers,
                    residual,
                });
            };
            if has("in_layers.") {
                add(sgm, format!("{into}.resnets.{}", self.resnets), true);
                self.resnets += 1;
            } else if has("transformer_blocks.") {
                add(sgm, format!("{into}.attentions.{}", self.attentions), false);
                self.attentions += 1;
            } else if has("op.") {
                add(
                    format!("{sgm}.op"),
                    format!("{into}.downsamplers.0.conv"),
                    false,
                );
                ends = true;
            } else if has("conv.") {
                add(
                    format!("{sgm}.conv"),
                    format!("{into}.upsamplers.0.conv"),
                    false,
                );
                ends = true;
            }
        }
        ends
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;
    use proptest::prelude::*;
    use safetensors::Dtype;
    use safetensors::tensor::TensorView;

    /// sgm's and diffusers' paths of a UNet, from the rules by which each numbers its blocks.
    fn expected(blocks: u64, attention: &[bool]) -> Vec<(String, String)> {
        let levels = attention.len() as u64;
        let mut pairs = Vec::new();
        let mut add = |sgm: String, diffusers: String| pairs.push((sgm, diffusers));
        let residual = |at: String, to: String| {
            [
                (format!("{at}.in_layers.2"), format!("{to}.conv1")),
                (format!("{at}.emb_layers.1"), format!("{to}.time_emb_proj")),
                (format!("{at}.out_layers.3"), format!("{to}.conv2")),
                (
                    format!("{at}.skip_connection"),
                    format!("{to}.conv_shortcut"),
                ),
            ]
        };
        let attend = |at: String, to: String| {
            let query = "transformer_blocks.0.attn1.to_q";
            [
                (format!("{at}.{query}"), format!("{to}.{query}")),
                (format!("{at}.proj_in"), format!("{to}.proj_in")),
            ]
        };
        add("input_blocks.0.0".into(), "conv_in".into());
        add("label_emb.0.2".into(), "add_embedding.linear_2".into());
        add("time_embed.0".into(), "time_embedding.linear_1".into());
        add("out.2".into(), "conv_out".into());
        for (level, &attends) in (0_u64..).zip(attention) {
            let first = 1 + level * (blocks + 1);
            for block in 0..blocks {
                let (at, to) = (first + block, format!("down_blocks.{level}"));
                residual(
                    format!("input_blocks.{at}.0"),
                    format!("{to}.resnets.{block}"),
                )
                .into_iter()
                .for_each(|(a, b)| add(a, b));
                if attends {
                    attend(
                        format!("input_blocks.{at}.1"),
                        format!("{to}.attentions.{block}"),
                    )
                    .into_iter()
                    .for_each(|(a, b)| add(a, b));
                }
            }
            if level + 1 < levels {
                add(
                    format!("input_blocks.{}.0.op", first + blocks),
                    format!("down_blocks.{level}.downsamplers.0.conv"),
                );
            }
        }
        for (up, &attends) in (0_u64..).zip(attention.iter().rev()) {
            let (first, to) = (up * (blocks + 1), format!("up_blocks.{up}"));
            for block in 0..=blocks {
                let at = first + block;
                residual(
                    format!("output_blocks.{at}.0"),
                    format!("{to}.resnets.{block}"),
                )
                .into_iter()
                .for_each(|(a, b)| add(a, b));
                if attends {
                    attend(
                        format!("output_blocks.{at}.1"),
                        format!("{to}.attentions.{block}"),
                    )
                    .into_iter()
                    .for_each(|(a, b)| add(a, b));
                }
            }
            if up + 1 < levels {
                add(
                    format!(
                        "output_blocks.{}.{}.conv",
                        first + blocks,
                        1 + u64::from(attends)
                    ),
                    format!("{to}.upsamplers.0.conv"),
                );
            }
        }
        for (at, to) in [(0, 0), (2, 1)] {
            residual(
                format!("middle_block.{at}"),
                format!("mid_block.resnets.{to}"),
            )
            .into_iter()
            .for_each(|(a, b)| add(a, b));
        }
        attend("middle_block.1".into(), "mid_block.attentions.0".into())
            .into_iter()
            .for_each(|(a, b)| add(a, b));
        pairs
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn every_depth_is_named_as_diffusers_names_it(
            blocks in 1_u64..4,
            attention in prop::collection::vec(any::<bool>(), 1..6),
        ) {
            let pairs = expected(blocks, &attention);
            let views = pairs.iter().map(|(sgm, _)| {
                let view = TensorView::new(Dtype::F32, vec![1, 1], &[0; 4]).expect("a tensor");
                (format!("unet.{sgm}.weight"), view)
            });
            let bytes = safetensors::serialize(views, None).expect("a file");
            let dir = tempfile::tempdir().expect("a folder");
            let path = dir.path().join("unet.safetensors");
            std::fs::write(&path, bytes).expect("written");
            let checkpoint = Checkpoint::open(&path).expect("readable");
            let section = Section::new("unet.safetensors", checkpoint.root());
            let modules = modules(&section, "unet.");
            for (sgm, name) in pairs {
                prop_assert_eq!(diffusers(&modules, &sgm), Some(name), "{}", sgm);
            }
        }
    }
}
