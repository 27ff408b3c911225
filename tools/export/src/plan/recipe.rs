//! A plan from a recipe: sources named one by one.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use bundle::{Precision, StageName};
use serde::Deserialize;

use super::diffusers::Told;
use super::{LoraPlan, ModelSettings, Plan, PlanError, SubjectPlan, read_text};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Recipe {
    #[serde(default = "first_version")]
    bundle_version: u64,
    precision: Precision,
    #[serde(default)]
    random_weights: bool,
    #[serde(default)]
    allow_unexpected: bool,
    #[serde(default = "audited")]
    audit: bool,
    #[serde(default)]
    licences: Vec<String>,
    sources: Sources,
    #[serde(default)]
    subjects: Vec<SubjectPlan>,
    #[serde(default)]
    loras: Vec<LoraPlan>,
    #[serde(default)]
    without: Vec<StageName>,
    #[serde(default)]
    settings: ModelSettings,
}

fn first_version() -> u64 {
    1
}

fn audited() -> bool {
    true
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Sources {
    mindeye: Option<PathBuf>,
    unclip: Option<PathBuf>,
    autoenc: Option<PathBuf>,
    sdxl: Option<PathBuf>,
    bridge: Option<PathBuf>,
    captioner: Option<PathBuf>,
    preview: Option<PathBuf>,
}

impl Plan {
    /// Reads a recipe; its paths are relative to its own folder.
    ///
    /// # Errors
    /// [`PlanError`] names the line or field.
    pub fn from_recipe(path: &Path) -> Result<Plan, PlanError> {
        let text = read_text(path)?;
        let recipe: Recipe = toml::from_str(&text).map_err(|error| PlanError::Recipe {
            path: path.to_owned(),
            message: error.to_string(),
        })?;
        let base = path.parent().unwrap_or(Path::new(""));
        let at = |file: Option<PathBuf>| file.map(|file| base.join(file));
        let subjects = recipe
            .subjects
            .into_iter()
            .map(|subject| SubjectPlan {
                mask: at(subject.mask.clone()),
                ..subject
            })
            .collect();
        let loras = recipe
            .loras
            .into_iter()
            .map(|lora| LoraPlan {
                file: base.join(&lora.file),
                ..lora
            })
            .collect();
        let sdxl = at(recipe.sources.sdxl);
        let mut settings = recipe.settings;
        let said = settings_said(&text);
        Told::read(sdxl.as_deref())?.apply(&mut settings, |field| said.contains(field));
        let plan = Plan {
            bundle_version: recipe.bundle_version,
            precision: recipe.precision,
            random_weights: recipe.random_weights,
            licences: recipe.licences,
            mindeye: at(recipe.sources.mindeye),
            unclip: at(recipe.sources.unclip),
            autoenc: at(recipe.sources.autoenc),
            sdxl,
            bridge: at(recipe.sources.bridge),
            captioner: at(recipe.sources.captioner),
            preview: at(recipe.sources.preview),
            subjects,
            loras,
            without: recipe.without,
            settings,
            allow_unexpected: recipe.allow_unexpected,
            audit: recipe.audit,
            onnxruntime: None,
            notes: Vec::new(),
        };
        plan.checked(path)
    }
}

/// Settings that a recipe, found right before, gives itself.
fn settings_said(text: &str) -> BTreeSet<String> {
    let recipe: toml::Table = toml::from_str(text).unwrap_or_default();
    let settings = recipe.get("settings").and_then(toml::Value::as_table);
    settings
        .map(|table| table.keys().cloned().collect())
        .unwrap_or_default()
}
