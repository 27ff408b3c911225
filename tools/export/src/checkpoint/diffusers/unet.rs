//! `UNet2DConditionModel`: which block of sgm's list each block is.

use super::{Component, Pairs, Tensors, rename};

const SHOWN: &str = "model.diffusion_model.";

/// Names of a residual block's parts.
const RESNET: [(&str, &str); 6] = [
    ("norm1.", "in_layers.0."),
    ("conv1.", "in_layers.2."),
    ("time_emb_proj.", "emb_layers.1."),
    ("norm2.", "out_layers.0."),
    ("conv2.", "out_layers.3."),
    ("conv_shortcut.", "skip_connection."),
];

/// Names outside the blocks.
const FIXED: [(&str, &str); 8] = [
    ("conv_in.", "input_blocks.0.0."),
    ("time_embedding.linear_1.", "time_embed.0."),
    ("time_embedding.linear_2.", "time_embed.2."),
    ("add_embedding.linear_1.", "label_emb.0.0."),
    ("add_embedding.linear_2.", "label_emb.0.2."),
    ("conv_norm_out.", "out.0."),
    ("conv_out.", "out.2."),
    ("mid_block.attentions.0.", "middle_block.1."),
];

fn resnet(pairs: &mut Pairs, spelt: &str, shown: &str) {
    for (part, as_shown) in RESNET {
        pairs.push((
            format!("{spelt}{part}"),
            format!("{SHOWN}{shown}{as_shown}"),
        ));
    }
}

/// Checks the settings and renames the tensors.
pub(super) fn read(unet: &mut Component<'_>) -> Tensors {
    let checks: [(&str, &[&str]); 6] = [
        ("_class_name", &["UNet2DConditionModel"]),
        ("act_fn", &["silu", "swish"]),
        ("norm_num_groups", &["32"]),
        ("addition_embed_type", &["text_time"]),
        ("flip_sin_to_cos", &["true"]),
        ("freq_shift", &["0"]),
    ];
    for (field, expected) in checks {
        if let Some(problem) = unet
            .config
            .as_ref()
            .and_then(|c| c.differs(field, expected))
        {
            unet.problem(problem);
        }
    }
    let pairs = pairs(unet);
    rename(unet, &pairs, "unet.")
}

/// Residual blocks of each down block: from the settings, so that a missing tensor moves no others.
fn depths(unet: &Component<'_>) -> Vec<u64> {
    let numbers = |field| {
        unet.config
            .as_ref()
            .and_then(|config| config.numbers(field))
    };
    let told = numbers("layers_per_block");
    let blocks = numbers("block_out_channels")
        .map_or_else(|| unet.count("down_blocks."), |each| each.len() as u64);
    let counted = |block: u64| unet.count(&format!("down_blocks.{block}.resnets."));
    let most = unet.tensors.len() as u64;
    (0..blocks)
        .map(|block| match told.as_deref() {
            Some([one]) => (*one).min(most),
            Some(each) => {
                let at = usize::try_from(block).unwrap_or(usize::MAX);
                each.get(at)
                    .map_or_else(|| counted(block), |&n| n.min(most))
            }
            None => counted(block),
        })
        .collect()
}

fn pairs(unet: &Component<'_>) -> Pairs {
    let mut pairs: Pairs = FIXED
        .map(|(spelt, shown)| (spelt.to_owned(), format!("{SHOWN}{shown}")))
        .to_vec();
    for (n, shown) in [(0, 0), (1, 2)] {
        resnet(
            &mut pairs,
            &format!("mid_block.resnets.{n}."),
            &format!("middle_block.{shown}."),
        );
    }
    let depths = depths(unet);
    let mut at = 1;
    for (block, &depth) in depths.iter().enumerate() {
        for n in 0..depth {
            let spelt = format!("down_blocks.{block}.");
            resnet(
                &mut pairs,
                &format!("{spelt}resnets.{n}."),
                &format!("input_blocks.{at}.0."),
            );
            pairs.push((
                format!("{spelt}attentions.{n}."),
                format!("{SHOWN}input_blocks.{at}.1."),
            ));
            at += 1;
        }
        // The last block does not halve.
        if block + 1 < depths.len() {
            pairs.push((
                format!("down_blocks.{block}.downsamplers.0.conv."),
                format!("{SHOWN}input_blocks.{at}.0.op."),
            ));
            at += 1;
        }
    }
    let mut at = 0_u64;
    for (block, &depth) in depths.iter().rev().enumerate() {
        let spelt = format!("up_blocks.{block}.");
        for n in 0..=depth {
            resnet(
                &mut pairs,
                &format!("{spelt}resnets.{n}."),
                &format!("output_blocks.{at}.0."),
            );
            pairs.push((
                format!("{spelt}attentions.{n}."),
                format!("{SHOWN}output_blocks.{at}.1."),
            ));
            at += 1;
        }
        // In sgm it is the last module of the block's last entry.
        let attends = unet.count(&format!("{spelt}attentions.")) > 0;
        let module = if attends { 2 } else { 1 };
        pairs.push((
            format!("{spelt}upsamplers.0.conv."),
            format!("{SHOWN}output_blocks.{}.{module}.conv.", at - 1),
        ));
    }
    pairs
}
