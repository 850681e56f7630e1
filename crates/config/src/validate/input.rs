//! Checks of the sections `[prompt]` and `[model]` as far as they concern the input of models.

use crate::schema::Config;

/// Adds a message to `out` for every problem.
pub(super) fn check(c: &Config, out: &mut Vec<String>) {
    let mut require = |ok: bool, message: String| {
        if !ok {
            out.push(message);
        }
    };
    let m = &c.model;
    require(
        m.min_pixels == 0 || m.max_pixels == 0 || m.min_pixels <= m.max_pixels,
        format!("model.min_pixels ({}) is above model.max_pixels ({})", m.min_pixels, m.max_pixels),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contradicting_pixel_bounds_are_refused() {
        for (min, max, fine) in [(0, 0, true), (9, 0, true), (0, 9, true), (9, 9, true), (10, 9, false)] {
            let mut c = Config::default();
            c.model.min_pixels = min;
            c.model.max_pixels = max;
            let mut out = Vec::new();
            check(&c, &mut out);
            assert_eq!(out.is_empty(), fine, "{min} {max}: {out:?}");
            assert!(fine || out[0].contains("model.min_pixels (10)") && out[0].contains("model.max_pixels (9)"));
            let settings = c.input_settings();
            assert_eq!((settings.min_pixels.unwrap_or(0), settings.max_pixels.unwrap_or(0)), (min, max));
        }
    }

    #[test]
    fn prompts_are_fixed_for_a_run() {
        let before = Config::default();
        let mut now = before.clone();
        now.prompt.system = "Be brief.".into();
        now.prompt.template = "{{ question }}".into();
        now.prompt.suffix = " Answer in JSON.".into();
        now.model.min_pixels = 1;
        now.model.max_pixels = 2;
        now.answer.form = crate::schema::AnswerFormChoice::Json;
        let refused: Vec<String> =
            crate::change::changes(&before, &now).into_iter().filter(|c| !c.allowed).map(|c| c.key).collect();
        let keys = [
            "answer.form",
            "model.max_pixels",
            "model.min_pixels",
            "prompt.suffix",
            "prompt.system",
            "prompt.template",
        ];
        assert!(keys.iter().all(|key| refused.iter().any(|r| r == key)), "{refused:?}");
        assert_eq!(refused.len(), keys.len(), "{refused:?}");
        let settings = now.input_settings().prompt;
        assert_eq!((settings.system.as_str(), settings.suffix.as_str()), ("Be brief.", " Answer in JSON."));
        assert_eq!((settings.template.as_str(), settings.question), ("{{ question }}", now.data.question));
    }
}
