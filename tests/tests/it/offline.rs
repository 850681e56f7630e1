//! `generate`, `score` and `reward score` on files, and comparison with transformers.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};
use unveil_testkit::{Sandbox, json_lines};

const KEYS: [&str; 8] = ["id", "index", "tokens", "text", "logprobs", "boxes", "finish", "vision_relevance"];

fn records(path: &Path) -> Vec<Value> {
    json_lines(&std::fs::read_to_string(path).expect("records"))
}

fn keys(line: &Value) -> Vec<&str> {
    line.as_object().expect("an object").keys().map(String::as_str).collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("a list").iter().map(|v| v.as_f64().expect("a number")).collect()
}

#[test]
fn generate_score_and_reward_agree() {
    for family in ["qwen2_5_vl", "qwen3_vl"] {
        check_family(family);
    }
}

fn check_family(family: &str) {
    let s = Sandbox::new();
    let data = s.synth("data", 5, 2);
    let model = s.tiny_model_of_family(family, "model", 1);
    let data_arg = data.to_string_lossy();
    let model_arg = model.to_string_lossy();
    let generate = |seed: &str| {
        let args = [
            "generate",
            "--model",
            &model_arg,
            "--data",
            &data_arg,
            "--n",
            "3",
            "--max-new-tokens",
            "16",
            "--seed",
            seed,
        ];
        s.unveil(&args).ok().stdout
    };
    let text = generate("5");
    assert_eq!(text, generate("5"), "the same seed gives the same bytes");
    assert_ne!(text, generate("6"), "another seed gives other answers");
    let lines = json_lines(&text);
    let of_id: BTreeMap<String, Value> =
        records(&data).into_iter().map(|r| (r["id"].as_str().expect("an id").to_owned(), r)).collect();
    assert_eq!(lines.len(), 15);
    let mut responses = Vec::new();
    for (i, line) in lines.iter().enumerate() {
        assert_eq!(keys(line), KEYS, "{line}");
        assert_eq!(line["index"], i % 3);
        assert!(matches!(line["finish"].as_str(), Some("stop" | "length")), "{line}");
        let logprobs = numbers(&line["logprobs"]);
        assert_eq!(logprobs.len(), line["tokens"].as_array().map_or(0, Vec::len));
        assert!((1..=16).contains(&logprobs.len()) && logprobs.iter().all(|l| *l <= 0.0), "{line}");
        let mut response = of_id[line["id"].as_str().expect("an id")].clone();
        let fields = response.as_object_mut().expect("a record");
        fields.insert("index".into(), line["index"].clone());
        fields.insert("tokens".into(), line["tokens"].clone());
        fields.insert("response".into(), line["text"].clone());
        responses.push(response.to_string());
    }
    let file = s.write("data/responses.jsonl", responses.join("\n"));
    let file = file.to_string_lossy();

    let scored = s.unveil(&["score", "--model", &model_arg, "--data", &file]).ok().json();
    assert_eq!(scored.len(), lines.len());
    for (a, b) in lines.iter().zip(&scored) {
        assert_eq!(keys(b), ["id", "index", "tokens", "logprobs", "vision_relevance"], "{b}");
        for key in ["id", "index", "tokens"] {
            assert_eq!(a[key], b[key]);
        }
        let x = numbers(&a["logprobs"]);
        let y = numbers(&b["logprobs"]);
        let worst = x.iter().zip(&y).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
        assert!(x.len() == y.len() && worst <= 1e-5, "log-probabilities differ by {worst}\n{a}\n{b}");
        match (a["vision_relevance"].as_f64(), b["vision_relevance"].as_f64()) {
            (None, None) => {}
            (x, y) => assert!((x.unwrap_or(9.0) - y.unwrap_or(-9.0)).abs() < 1e-5, "{a}\n{b}"),
        }
    }

    // bf16 weights: both commands use the same ones, and still agree.
    let half = "run.dtype=\"bfloat16\"";
    let args =
        ["generate", "--model", &model_arg, "--data", &data_arg, "--n", "3", "--max-new-tokens", "16", "--seed", "5"];
    let made = s.unveil(&[&args[..], &["--set", half]].concat()).ok().json();
    assert_ne!(made, lines, "the dtype takes effect");
    let given: Vec<String> = made
        .iter()
        .map(|line| {
            let mut response = of_id[line["id"].as_str().expect("an id")].clone();
            response["index"] = line["index"].clone();
            response["tokens"] = line["tokens"].clone();
            response.to_string()
        })
        .collect();
    let halves = s.write("data/halves.jsonl", given.join("\n"));
    let halves = halves.to_string_lossy();
    let scored = s.unveil(&["score", "--model", &model_arg, "--data", &halves, "--set", half]).ok().json();
    let both = made.iter().zip(&scored);
    let deltas: Vec<f64> = both
        .flat_map(|(a, b)| numbers(&a["logprobs"]).into_iter().zip(numbers(&b["logprobs"])).map(|(x, y)| (x - y).abs()))
        .collect();
    let mean = deltas.iter().sum::<f64>() / deltas.len() as f64;
    assert!(
        deltas.len() > 20 && mean <= 1e-3 && deltas.iter().all(|d| *d <= 1e-2),
        "bf16 differs by {mean} on average"
    );

    check_heads(&s, &model_arg, &data_arg);

    let set = format!("model.dir={model_arg}");
    let rewards = s.unveil(&["reward", "score", "--set", &set, "--data", &file]).ok().json();
    assert_eq!(rewards.len(), lines.len());
    for (line, reward) in lines.iter().zip(&rewards) {
        assert_eq!((&reward["id"], &reward["index"]), (&line["id"], &line["index"]));
        assert!(reward["total"].is_number(), "{reward}");
        let components = reward["components"].as_object().expect("components");
        for name in ["localization", "vision_relevance", "format", "category"] {
            let c = components.get(name).unwrap_or_else(|| panic!("no {name}: {reward}"));
            let masked = c["masked"].as_bool().expect("masked");
            assert_eq!(masked, c["value"].is_null(), "masked is never 0: {reward}");
            let reason = &c["reason"];
            let is_remark = name == "format" && c["value"] == 0.0 && reason["form"].is_string();
            assert!(!masked || reason.is_string() || reason.is_object(), "a mask has a reason: {reward}");
            assert!(masked || reason.is_null() || is_remark, "only a broken form is remarked on: {reward}");
        }
    }
}

/// Writes attention by head, chooses a head from it, and checks that this head gives the relevance for which it was chosen.
fn check_heads(s: &Sandbox, model: &str, data: &str) {
    let heads = s.path("heads.jsonl");
    let chosen = s.path("heads.toml");
    let heads = heads.to_string_lossy();
    let chosen = chosen.to_string_lossy();
    let score = ["score", "--model", model, "--data", data, "--answers"];
    let plain = s.unveil(&[&score[..], &["--heads", &heads]].concat()).ok().json();
    let choice = &s.unveil(&["reward", "calibrate", "--data", &heads, "--top", "1", "--out", &chosen]).ok().json()[0];
    let set = format!("reward.vision_relevance.heads_file={chosen}");
    let read = s.unveil(&[&score[..], &["--set", &set]].concat()).ok().json();
    let defined = |lines: &[Value]| lines.iter().filter_map(|l| l["vision_relevance"].as_f64()).collect::<Vec<f64>>();
    let plain = defined(&plain);
    let read = defined(&read);
    assert!(read.len() > 1 && choice["samples"] == read.len() && plain != read, "{plain:?} {read:?} {choice}");
    let mean = read.iter().sum::<f64>() / read.len() as f64;
    let best = choice["measured"][0]["score"].as_f64();
    assert!((mean - best.expect("a score")).abs() < 1e-5, "{mean} {choice}");
}

#[test]
fn better_answers_get_higher_rewards() {
    let s = Sandbox::new();
    let line = |id: &str, index: u32, response: &str| {
        json!({"id": id, "image_size": [100, 80], "question": "Where?", "category": "nodule", "boxes": [[10, 20, 50, 60]],
            "labels": ["nodule"], "index": index, "response": response})
        .to_string()
    };
    let lines = [line("a", 0, "[10,20,50,60] nodule"), line("a", 1, "[60,20,90,60] nodule"), line("a", 2, "what?")];
    let file = s.write("responses.jsonl", lines.join("\n"));
    let done = s.unveil(&["reward", "score", "--data", &file.to_string_lossy()]).ok().json();
    let value = |i: usize, name: &str| done[i]["components"][name]["value"].as_f64();
    assert_eq!([0, 1, 2].map(|i| value(i, "localization")), [Some(1.0), Some(0.0), Some(0.0)]);
    assert_eq!([0, 1, 2].map(|i| value(i, "category")), [Some(1.0), Some(1.0), Some(0.0)]);
    let total = |i: usize| done[i]["total"].as_f64().expect("a total");
    assert!(total(0) > total(1) && total(1) > total(2), "{done:?}");
}

const TRANSFORMERS: &str = r#"
import json, os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model_dir, data = sys.argv[1:]
torch.set_num_threads(1)
processor = AutoProcessor.from_pretrained(model_dir)
model = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()
banned = [processor.tokenizer.convert_tokens_to_ids(t) for t in
          ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"]]
for line in open(data):
    record = json.loads(line)
    image = Image.open(os.path.join(os.path.dirname(data), record["image"])).convert("RGB")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": record["question"]}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    out = model.generate(**inputs, do_sample=False, max_new_tokens=24, suppress_tokens=banned)
    tokens = out[0, inputs["input_ids"].shape[1]:].tolist()
    print(json.dumps({"id": record["id"], "class": type(model).__name__, "images": (inputs["input_ids"] == banned[0]).sum().item(),
                      "tokens": tokens, "text": processor.tokenizer.decode(tokens, skip_special_tokens=True)}))
"#;

#[test]
fn exported_models_answer_the_same_in_transformers() {
    for (family, class) in
        [("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"), ("qwen3_vl", "Qwen3VLForConditionalGeneration")]
    {
        let s = Sandbox::new();
        let data = s.synth("data", 3, 4);
        let model = s.tiny_model_of_family(family, "model", 2);
        let out = s.path("exported");
        let data = data.to_string_lossy();
        let model = model.to_string_lossy();
        let out = out.to_string_lossy();
        let described = s.unveil(&["model", "export", &model, "--out", &out]).ok().json();
        assert_eq!((&described[0]["family"], &described[0]["dtype"]), (&json!(family), &json!("float32")));
        let theirs = s.python(TRANSFORMERS, &[&out, &data]).ok().json();
        let args = ["generate", "--model", &model, "--data", &data, "--temperature", "0", "--max-new-tokens", "24"];
        let ours = s.unveil(&args).ok().json();
        assert_eq!((ours.len(), theirs.len()), (3, 3));
        for (a, b) in ours.iter().zip(&theirs) {
            assert_eq!(b["class"], class);
            assert_eq!(b["images"], 36, "min_pixels corresponds to 36 image tokens");
            assert_eq!((&a["id"], &a["tokens"], &a["text"]), (&b["id"], &b["tokens"], &b["text"]));
        }
        let half = s.unveil(&["model", "export", &model, "--out", &format!("{out}-half"), "--dtype", "bfloat16"]).ok();
        assert_eq!(half.json()[0]["dtype"], "bfloat16");
        let refused = s.unveil(&["model", "export", &model, "--out", &model]).exits(1);
        assert!(refused.stderr.contains("onto itself"), "{}", refused.stderr);
    }
}

/// Stop strings, filters that leave one token, and a memory limit that is too low.
#[test]
fn sampling_options_and_memory_limits_apply() {
    let s = Sandbox::new();
    let data = s.synth("data", 2, 7);
    let model = s.tiny_model("model", 3);
    let data = data.to_string_lossy();
    let model = model.to_string_lossy();
    let base = ["generate", "--model", &model, "--data", &data, "--seed", "1", "--max-new-tokens"];
    let up_to = |tokens: &'static str, more: &[&str]| s.unveil(&[&base[..], &[tokens], more].concat());
    let run = |more: &[&str]| up_to("16", more);
    let greedy = run(&["--temperature", "0"]).ok().json();
    let tokens = |lines: &[Value]| lines.iter().map(|l| l["tokens"].clone()).collect::<Vec<_>>();
    for one in [["--top-k", "1"], ["--top-p", "0.000001"], ["--min-p", "1"]] {
        assert_eq!(tokens(&run(&one).ok().json()), tokens(&greedy), "{one:?}");
    }
    // A stop string that occurs in the answers ends them.
    let free = run(&["--n", "8"]).ok().json();
    let text = |line: &Value| line["text"].as_str().expect("a text").to_owned();
    let letter = |t: &str| t.chars().skip(1).find(|c| c.is_ascii_alphabetic());
    let stop = free.iter().find_map(|l| letter(&text(l))).expect("no answer holds a letter").to_string();
    let stopped = run(&["--n", "8", "--stop", &stop]).ok().json();
    let mut ended = 0;
    for (a, b) in free.iter().zip(&stopped) {
        let a = text(a);
        let b = text(b);
        assert!(a.starts_with(&b), "`{b}` is not the beginning of `{a}`");
        let holds = a.contains(&stop);
        assert_eq!(b.contains(&stop), holds);
        ended += usize::from(holds && b.len() < a.len());
        // Text after the stop string comes from the same token.
        assert!(!holds || b.find(&stop).is_some_and(|at| b.len() - at < 16), "`{b}` continues after `{stop}`");
    }
    assert!(ended > 0 && stopped.iter().any(|l| l["finish"] == "stop"));
    let refused = run(&["--set", "rollout.memory_gib=0.001"]).exits(1);
    for word in ["MiB", "max_new_tokens", "image size"] {
        assert!(refused.stderr.contains(word), "{}", refused.stderr);
    }
    let refused = up_to("5000", &[]).exits(1);
    assert!(refused.stderr.contains("5000") && refused.stderr.contains("2048"), "{}", refused.stderr);
}
