//! `AutoencoderKL`: its decoder counts blocks from the smallest picture up, sgm's from the largest.

use super::{Component, Pairs, Tensors, rename};

const SHOWN: &str = "first_stage_model.";

/// The middle attention, also under its older names.
const ATTENTION: [(&str, &str); 9] = [
    ("group_norm.", "norm."),
    ("query.", "q."),
    ("key.", "k."),
    ("value.", "v."),
    ("proj_attn.", "proj_out."),
    ("to_q.", "q."),
    ("to_k.", "k."),
    ("to_v.", "v."),
    ("to_out.0.", "proj_out."),
];

fn resnet(pairs: &mut Pairs, spelt: &str, shown: &str) {
    // All but the shortcut are called the same.
    for (part, as_shown) in [("", ""), ("conv_shortcut.", "nin_shortcut.")] {
        pairs.push((
            format!("{spelt}{part}"),
            format!("{SHOWN}{shown}{as_shown}"),
        ));
    }
}

/// Checks the settings and renames the tensors.
pub(super) fn read(vae: &mut Component<'_>) -> Tensors {
    let checks: [(&str, &[&str]); 3] = [
        ("_class_name", &["AutoencoderKL"]),
        ("act_fn", &["silu", "swish"]),
        ("norm_num_groups", &["32"]),
    ];
    for (field, expected) in checks {
        if let Some(problem) = vae.config.as_ref().and_then(|c| c.differs(field, expected)) {
            vae.problem(problem);
        }
    }
    let pairs = pairs(vae);
    rename(vae, &pairs, "vae.")
}

fn pairs(vae: &Component<'_>) -> Pairs {
    let mut pairs = Pairs::new();
    for same in ["quant_conv.", "post_quant_conv."] {
        pairs.push((same.into(), format!("{SHOWN}{same}")));
    }
    for side in ["encoder.", "decoder."] {
        for (spelt, shown) in [
            ("conv_in.", "conv_in."),
            ("conv_norm_out.", "norm_out."),
            ("conv_out.", "conv_out."),
        ] {
            pairs.push((format!("{side}{spelt}"), format!("{SHOWN}{side}{shown}")));
        }
        for (part, as_shown) in ATTENTION {
            pairs.push((
                format!("{side}mid_block.attentions.0.{part}"),
                format!("{SHOWN}{side}mid.attn_1.{as_shown}"),
            ));
        }
        for (n, shown) in [(0, 1), (1, 2)] {
            resnet(
                &mut pairs,
                &format!("{side}mid_block.resnets.{n}."),
                &format!("{side}mid.block_{shown}."),
            );
        }
    }
    // Without the settings, the blocks that the tensors name.
    let told = vae
        .config
        .as_ref()
        .and_then(|config| config.numbers("block_out_channels"))
        .map(|channels| channels.len() as u64);
    for (side, spelt, shown, size) in [
        ("encoder.", "down_blocks", "down", "downsample"),
        ("decoder.", "up_blocks", "up", "upsample"),
    ] {
        let blocks = told.unwrap_or_else(|| vae.count(&format!("{side}{spelt}.")));
        for block in 0..blocks {
            let from = format!("{side}{spelt}.{block}.");
            let other = if shown == "up" {
                blocks - 1 - block
            } else {
                block
            };
            let to = format!("{side}{shown}.{other}.");
            for n in 0..vae.count(&format!("{from}resnets.")) {
                resnet(
                    &mut pairs,
                    &format!("{from}resnets.{n}."),
                    &format!("{to}block.{n}."),
                );
            }
            pairs.push((
                format!("{from}{size}rs.0.conv."),
                format!("{SHOWN}{to}{size}.conv."),
            ));
        }
    }
    pairs
}
