//! Modules that are trained whole beside adapters (`modules_to_save` of peft), such as the merger of the vision tower.

use tch::Tensor;

use crate::layers::ops::detached_copy;
use crate::{ModelError, Result};

type NamedTensors = Vec<(String, Tensor)>;

/// Modules of a model and their parameters, which are those of the model itself.
#[derive(Debug, Default)]
pub(crate) struct SavedModules {
    /// Names of the modules.
    pub names: Vec<String>,
    /// All parameters of the modules, in the order of the model.
    pub parameters: NamedTensors,
    /// Values of the parameters in the base model.
    originals: Vec<Tensor>,
}

impl SavedModules {
    /// Selects modules by full name or by the last dot-separated parts of it, and keeps copies of their parameters.
    pub(crate) fn select(parameters: &[(String, Tensor)], selectors: &[String]) -> Result<Self> {
        let (names, parameters) = select(parameters, selectors)?;
        let originals = parameters.iter().map(|(_, t)| detached_copy(t)).collect::<Result<_>>()?;
        Ok(Self { names, parameters, originals })
    }

    /// Exchanges the values of the parameters with those that they replace.
    pub(crate) fn swap(&self) {
        tch::no_grad(|| {
            for ((_, parameter), original) in self.parameters.iter().zip(&self.originals) {
                let present = parameter.copy();
                parameter.shallow_clone().copy_(original);
                original.shallow_clone().copy_(&present);
            }
        });
    }
}

/// Returns the names of the modules that `selectors` select, and their parameters.
pub(crate) fn select(parameters: &[(String, Tensor)], selectors: &[String]) -> Result<(Vec<String>, NamedTensors)> {
    let mut names: Vec<String> = Vec::new();
    for selector in selectors {
        let before = names.len();
        for module in parameters.iter().filter_map(|(name, _)| module_of(name, selector)) {
            if !names.iter().any(|n| n == module) {
                names.push(module.to_owned());
            }
        }
        let is_known = |(name, _): &(String, Tensor)| module_of(name, selector).is_some();
        if names.len() == before && !parameters.iter().any(is_known) {
            return Err(ModelError::input(format!(
                "no module is named `{selector}`: name a module of the model, such as visual.merger or lm_head"
            )));
        }
    }
    let is_within =
        |name: &str| names.iter().any(|m| name.strip_prefix(m.as_str()).is_some_and(|r| r.starts_with('.')));
    let chosen = parameters.iter().filter(|(name, _)| is_within(name));
    let chosen = chosen.map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
    Ok((names, chosen))
}

/// Returns the outermost module around the parameter `name` that `selector` selects.
fn module_of<'n>(name: &'n str, selector: &str) -> Option<&'n str> {
    let modules = name.match_indices('.').map(|(dot, _)| &name[..dot]);
    let mut selected =
        modules.filter(|m| m.strip_suffix(selector).is_some_and(|rest| rest.is_empty() || rest.ends_with('.')));
    selected.next()
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    fn parameters() -> Vec<(String, Tensor)> {
        let names =
            ["model.norm.weight", "visual.merger.mlp.0.bias", "visual.merger.mlp.2.bias", "visual.mergers.bias"];
        let zeros = |n: &str| (n.to_owned(), Tensor::zeros([2], (Kind::Float, Device::Cpu)));
        names.into_iter().map(zeros).collect()
    }

    #[test]
    fn modules_are_selected_by_their_last_parts() {
        let selected = |selectors: &[&str]| {
            let selectors: Vec<String> = selectors.iter().map(|s| (*s).to_owned()).collect();
            let (names, chosen) = select(&parameters(), &selectors).map_err(|e| e.to_string())?;
            Ok::<_, String>((names.join(" "), chosen.len()))
        };
        assert_eq!(selected(&["merger"]), Ok(("visual.merger".into(), 2)));
        assert_eq!(selected(&["visual.merger", "norm", "merger"]), Ok(("visual.merger model.norm".into(), 3)));
        assert_eq!(selected(&["mlp.2"]), Ok(("visual.merger.mlp.2".into(), 1)));
        assert!(selected(&["erger"]).is_err_and(|e| e.contains("`erger`")));
        assert!(selected(&["weight"]).is_err(), "a parameter is no module");
    }

    #[test]
    fn swapping_twice_restores_the_trained_values() {
        let all = parameters();
        let modules = SavedModules::select(&all, &["merger".to_owned()]).unwrap();
        let _ = all[1].1.shallow_clone().fill_(3.0);
        modules.swap();
        assert_eq!(all[1].1.double_value(&[0]), 0.0);
        modules.swap();
        assert_eq!(all[1].1.double_value(&[0]), 3.0);
    }
}
