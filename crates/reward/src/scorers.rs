//! All scorers of a configuration, loaded once, and the scoring of a group by them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use unveil_config::Config;
use unveil_core::{Breakdown, Component, MaskReason};

use crate::RewardError;
use crate::embed::Embedder;
use crate::external::{CustomScorer, Judge};
use crate::relevance::reference_text;
use crate::score::{Components, GroupInput, compose_breakdowns, compute_components};
use crate::scoring::{Resources, Scoring};
use crate::symbolic::RuleTable;
use unveil_config::schema::RelevanceKind;

/// The scorers of a configuration.
#[derive(Debug)]
pub struct Scorers {
    scoring: Scoring,
    resources: Resources,
    judge: Option<Judge>,
    custom: Vec<CustomScorer>,
}

impl Scorers {
    /// Loads the rule table, embedding model, prompt and keys that the configuration names. Custom scorers need a tokio runtime.
    ///
    /// # Errors
    /// Returns [`RewardError::Io`], [`RewardError::Named`] or [`RewardError::Config`] with the key of the setting whose file or value
    /// cannot be used.
    pub fn load(config: &Config) -> Result<Self, RewardError> {
        let scoring = Scoring::new(config);
        let r = &config.reward;
        let mut resources = Resources::default();
        if r.symbolic.weight > 0.0 {
            resources.symbolic = Some(RuleTable::load(Path::new(&r.symbolic.table))?);
        }
        if r.relevance.weight > 0.0 && r.relevance.kind == RelevanceKind::Embedding {
            resources.embedder = Some(Embedder::load(Path::new(&r.relevance.embedding_dir))?);
        }
        let judge = if scoring.uses_judge() {
            let key = unveil_config::read_secret("reward.judge.key_env", &r.judge.key_env, "")?;
            Some(Judge::new(&r.judge, key)?)
        } else {
            None
        };
        let custom = r.custom.iter().map(CustomScorer::new).collect::<Result<_, _>>()?;
        Ok(Self { scoring, resources, judge, custom })
    }

    /// Returns the weights, class names and modes.
    pub fn scoring(&self) -> &Scoring {
        &self.scoring
    }

    /// Whether another process computes some component.
    pub fn needs_external(&self) -> bool {
        self.judge.is_some() || !self.custom.is_empty()
    }

    /// Returns the external judge, if one is configured.
    pub fn judge(&self) -> Option<&Judge> {
        self.judge.as_ref()
    }

    /// Scores a group by the components of this process; those of external scorers are masked.
    pub fn score_locally(&self, group: &GroupInput) -> Vec<Breakdown> {
        let mut components = compute_components(&self.scoring, &self.resources, group);
        let not_asked = || Component::masked(MaskReason::Failed("was not asked".to_owned()));
        for response in &mut components {
            let external = self.judge.iter().map(|_| "relevance").chain(self.custom.iter().map(CustomScorer::name));
            response.extend(external.map(|name| (name.to_owned(), not_asked())));
        }
        compose_breakdowns(&self.scoring, group, components)
    }

    /// Scores a group by all components; local ones are computed on the pool of blocking threads. The judge and the custom scorers are
    /// called concurrently, each under its own deadline.
    pub async fn score(self: Arc<Self>, group: Arc<GroupInput>) -> Vec<Breakdown> {
        if !self.needs_external() {
            let scorers = Arc::clone(&self);
            let input = Arc::clone(&group);
            let scored = run_blocking(move || scorers.score_locally(&input)).await;
            return scored.unwrap_or_else(|why| self.mask_all(&group, &why));
        }
        let local = {
            let scorers = Arc::clone(&self);
            let input = Arc::clone(&group);
            run_blocking(move || compute_components(&scorers.scoring, &scorers.resources, &input))
        };
        let judged = async {
            let judge = self.judge.as_ref()?;
            if reference_text(&group.record).is_none() {
                return Some(vec![Component::masked(MaskReason::NotApplicable); group.responses.len()]);
            }
            let answers: Vec<Option<String>> =
                group.responses.iter().map(|r| self.scoring.answer_span(&r.text)).collect();
            let scored = judge.score(&group.record, &answers).await;
            Some(scored.into_iter().map(|c| c.with_version(judge.version().to_owned())).collect::<Vec<_>>())
        };
        let custom = futures::future::join_all(self.custom.iter().map(|c| c.score(&group)));
        let (local, judged, custom) = tokio::join!(local, judged, custom);
        let mut components = match local {
            Ok(components) => components,
            Err(why) => return self.mask_all(&group, &why),
        };
        let custom = self.custom.iter().map(CustomScorer::name).zip(custom);
        for (name, column) in judged.map(|j| ("relevance", j)).into_iter().chain(custom) {
            insert_column(&mut components, name, column);
        }
        compose_breakdowns(&self.scoring, &group, components)
    }

    /// Masks every component of a group whose scoring failed.
    fn mask_all(&self, group: &GroupInput, why: &str) -> Vec<Breakdown> {
        tracing::error!(group = group.record.id, "scoring failed, components masked: {why}");
        let masked = || Component::masked(MaskReason::Failed(why.to_owned()));
        let names: Vec<&str> = self.scoring.reward.components().into_iter().map(|(name, ..)| name).collect();
        let row = || -> BTreeMap<String, Component> { names.iter().map(|n| ((*n).to_owned(), masked())).collect() };
        compose_breakdowns(&self.scoring, group, group.responses.iter().map(|_| row()).collect())
    }
}

fn insert_column(components: &mut [Components], name: &str, column: Vec<Component>) {
    for (response, component) in components.iter_mut().zip(column) {
        response.insert(name.to_owned(), component);
    }
}

async fn run_blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.map_err(|e| format!("scoring failed: {e}"))
}
