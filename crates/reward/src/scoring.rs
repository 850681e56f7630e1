//! The part of the configuration that enters scores, and the files of scorers, which are loaded at start-up.

use std::collections::BTreeMap;

use unveil_config::Config;
use unveil_config::schema::{RelevanceKind, Reward};
use unveil_core::mention::{class_names, find_class_mention};
use unveil_core::{AnswerReader, ClassMatch, KnownClass, Record};

use crate::embed::Embedder;
use crate::symbolic::RuleTable;
use crate::text::clean::visible;

/// Part of the configuration that scoring depends on.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Scoring {
    /// Weights, normalisation and modes of the components.
    pub reward: Reward,
    /// Synonyms of each category that count as the same class.
    pub synonyms: BTreeMap<String, Vec<String>>,
    /// Reader of answers.
    pub reader: AnswerReader,
    /// Maximum length of a response in tokens, for the overlong punishment.
    pub max_tokens: usize,
}

impl Scoring {
    /// Copies the part of a run's configuration that enters scores.
    pub fn new(config: &Config) -> Self {
        Self {
            reward: config.reward.clone(),
            synonyms: config.data.synonyms.clone(),
            reader: config.answer_reader(),
            max_tokens: config.rollout.max_new_tokens,
        }
    }

    /// Returns the category and its synonyms; the lookup folds names as comparisons do.
    pub fn names(&self, category: &str) -> Vec<String> {
        class_names(category, &self.synonyms)
    }

    /// Returns the class of a record as answers may name it, distinguished from every other class that has synonyms.
    pub fn class(&self, category: &str) -> KnownClass {
        let others: Vec<String> = match self.reader.matching {
            ClassMatch::Equal => Vec::new(),
            ClassMatch::Contains => self.synonyms.iter().flat_map(|(k, v)| v.iter().chain([k]).cloned()).collect(),
        };
        KnownClass::new(&self.names(category), &others, self.reader.matching)
    }

    /// Finds the first mention of the record's class in a response, in bytes; `None` if the answer does not name it or the record is
    /// answered in text.
    pub fn find_mention(&self, record: &Record, text: &str) -> Option<std::ops::Range<usize>> {
        find_class_mention(&self.reader, &self.synonyms, record, text)
    }

    /// Returns the part of a text that relevance scorers see: the answer without hidden characters, truncated. `None`: the text has no
    /// answer.
    pub fn answer_span(&self, text: &str) -> Option<String> {
        Some(visible(&text[self.reader.span(text)?], self.reward.relevance.max_chars))
    }

    /// Whether relevance is scored by an external judge.
    pub(crate) fn uses_judge(&self) -> bool {
        self.reward.relevance.weight > 0.0 && self.reward.relevance.kind == RelevanceKind::Judge
    }
}

/// Files loaded at start-up (rule table, embedder); `None` for those that are not configured.
#[derive(Debug, Default)]
pub struct Resources {
    /// Rule table of the symbolic scorer.
    pub symbolic: Option<RuleTable>,
    /// Model of the embedding similarity.
    pub embedder: Option<Embedder>,
}
