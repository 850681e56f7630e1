//! The phases of stage 1 as the configuration describes them.

use std::path::PathBuf;

use unveil_config::{Config, SFT_PREFIXES};

/// A phase of stage 1.
#[derive(Debug, Clone)]
pub(crate) struct Phase {
    /// The configuration in which this phase is the whole of stage 1, up to its last update.
    pub config: Config,
    /// Updates of the phases before it.
    pub first_step: u64,
    /// Prefix of its checkpoints.
    pub prefix: &'static str,
    /// Directory of its model, unless it is the last phase.
    pub out: PathBuf,
}

/// Returns the phases of the configuration, at least one.
pub(crate) fn phases(config: &Config) -> Vec<Phase> {
    let mut first_step = 0;
    let mut phases = Vec::new();
    for ((number, phase), prefix) in (1..).zip(config.sft_phases()).zip(SFT_PREFIXES) {
        let mut own = config.clone();
        own.sft.steps = first_step + phase.steps;
        own.sft.frozen = phase.frozen;
        own.sft.lora = phase.lora;
        own.sft.optimizer = phase.optimizer;
        let out = config.run_dir().join(format!("stage1-phase-{number}"));
        phases.push(Phase { config: own, first_step, prefix, out });
        first_step += phase.steps;
    }
    phases
}

#[cfg(test)]
mod tests {
    use unveil_config::schema::SftPhase;

    use super::*;

    #[test]
    fn phases_follow_one_another() {
        let mut config = Config::default();
        let single = phases(&config);
        assert_eq!((single.len(), single[0].first_step, single[0].prefix), (1, 0, "sft"));
        assert_eq!(single[0].config, config);
        let phase = |steps: u64, lr: f64| SftPhase {
            steps,
            frozen: Vec::new(),
            lora: Default::default(),
            optimizer: unveil_config::schema::Optimizer { lr, ..Default::default() },
        };
        config.sft.stage = vec![phase(3, 0.5), phase(4, 0.25)];
        let two = phases(&config);
        let described: Vec<_> = two.iter().map(|p| (p.first_step, p.config.sft.steps, p.prefix)).collect();
        assert_eq!(described, [(0, 3, "sft"), (3, 7, "sft/phase-2")]);
        assert_eq!(two.iter().map(|p| p.config.sft.optimizer.lr).collect::<Vec<_>>(), [0.5, 0.25]);
    }
}
