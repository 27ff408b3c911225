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
