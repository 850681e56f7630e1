//! Everything that a configuration asks to score with, loaded once; and a group scored by all of it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use unveil_config::Config;
use unveil_core::{Breakdown, Component, MaskReason};

use crate::RewardError;
use crate::embed::Embedder;
use crate::outside::{CustomScorer, Judge};
use crate::relevance::reference;
use crate::score::{Components, GroupInput, Resources, Scoring, components, finish};
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
    /// Reads what the configuration names: rule table, embedding model, prompt, keys. Needs a runtime where users' scorers are
    /// configured.
    ///
    /// # Errors
    /// What cannot be read or used, by its key.
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
        let judge = if scoring.asks_judge() {
            let key = unveil_config::secret("reward.judge.key_env", &r.judge.key_env, "")?;
            Some(Judge::new(&r.judge, key)?)
        } else {
            None
        };
        let custom = r.custom.iter().map(CustomScorer::new).collect::<Result<_, _>>()?;
        Ok(Self { scoring, resources, judge, custom })
    }

    /// Weights, names and modes.
    pub fn scoring(&self) -> &Scoring {
        &self.scoring
    }

    /// Some component comes from another process.
    pub fn asks_others(&self) -> bool {
        self.judge.is_some() || !self.custom.is_empty()
    }

    /// The external judge, where there is one.
    pub fn judge(&self) -> Option<&Judge> {
        self.judge.as_ref()
    }

    /// Scores a group by what is computed here; what others would say is masked.
    pub fn score_here(&self, group: &GroupInput) -> Vec<Breakdown> {
        let mut here = components(&self.scoring, &self.resources, group);
        let unasked = || Component::masked(MaskReason::Failed("was not asked".to_owned()));
        for response in &mut here {
            let missing = self.judge.iter().map(|_| "relevance").chain(self.custom.iter().map(CustomScorer::name));
            response.extend(missing.map(|name| (name.to_owned(), unasked())));
        }
        finish(&self.scoring, group, here)
    }

    /// Scores a group by everything, computing on the pool of blocking threads. The judge and the users' scorers are asked at the
    /// same time, each under its own deadline; this takes no longer than the longest of them and the work here.
    pub async fn score(self: Arc<Self>, group: Arc<GroupInput>) -> Vec<Breakdown> {
        if !self.asks_others() {
            let (scorers, input) = (Arc::clone(&self), Arc::clone(&group));
            return blocking(move || scorers.score_here(&input)).await.unwrap_or_else(|why| self.lost(&group, &why));
        }
        let here = {
            let (scorers, input) = (Arc::clone(&self), Arc::clone(&group));
            blocking(move || components(&scorers.scoring, &scorers.resources, &input))
        };
        let judged = async {
            let judge = self.judge.as_ref()?;
            if reference(&group.record).is_none() {
                return Some(vec![Component::masked(MaskReason::NotApplicable); group.responses.len()]);
            }
            let answers: Vec<Option<String>> =
                group.responses.iter().map(|r| self.scoring.answer_span(&r.text)).collect();
            let said = judge.score(&group.record, &answers).await;
            Some(said.into_iter().map(|c| c.by(judge.version().to_owned())).collect::<Vec<_>>())
        };
        let custom = futures::future::join_all(self.custom.iter().map(|c| c.score(&group)));
        let (here, judged, custom) = tokio::join!(here, judged, custom);
        let mut all = match here {
            Ok(all) => all,
            Err(why) => return self.lost(&group, &why),
        };
        let named = self.custom.iter().map(CustomScorer::name).zip(custom);
        for (name, column) in judged.map(|j| ("relevance", j)).into_iter().chain(named) {
            add(&mut all, name, column);
        }
        finish(&self.scoring, &group, all)
    }

    /// Scoring itself failed: everything is masked.
    fn lost(&self, group: &GroupInput, why: &str) -> Vec<Breakdown> {
        tracing::error!(group = group.record.id, "scoring failed, masked: {why}");
        let masked = || Component::masked(MaskReason::Failed(why.to_owned()));
        let names: Vec<&str> = self.scoring.reward.components().into_iter().map(|(name, ..)| name).collect();
        let row = || -> BTreeMap<String, Component> { names.iter().map(|n| ((*n).to_owned(), masked())).collect() };
        finish(&self.scoring, group, group.responses.iter().map(|_| row()).collect())
    }
}

fn add(all: &mut [Components], name: &str, column: Vec<Component>) {
    for (response, component) in all.iter_mut().zip(column) {
        response.insert(name.to_owned(), component);
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.map_err(|e| format!("scoring failed: {e}"))
}
