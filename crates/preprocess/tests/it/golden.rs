//! Processor, tokenizer, chat template and resize rule against transformers on seeded random input (`UNVEIL_SEED` sets another seed).
//!
//! Each prompt is rendered with the template of the tiny processor and with templates structured like the published ones.

use std::path::Path;
use std::process::Command;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use unveil_core::{Family, Grid, InputSettings, PromptSettings, Record};
use unveil_data::image_store::Image;
use unveil_preprocess::family::{detect_family, processor_class};
use unveil_preprocess::preprocessor::Preprocessor;
use unveil_preprocess::processor::{Filter, ImageProcessor, resize, smart_resize};
use unveil_preprocess::tokenizer::Tokenizer;
use unveil_preprocess::tokenizer::tiny::{TinyProcessorSpec, write_tiny};
use unveil_testkit::python;

const SIZES: [(u32, u32); 16] = [
    (96, 96),
    (640, 480),
    (1, 1),
    (2, 3),
    (15, 17),
    (100, 40),
    (31, 400),
    (612, 612),
    (128, 96),
    (95, 97),
    (500, 33),
    (320, 240),
    (112, 112),
    (1000, 701),
    (56, 28),
    (7, 900),
];

const WORDS: [&str; 20] = [
    "no finding",
    "[1,2,3,4] nodule",
    "], [",
    "white blood cell",
    "1023",
    "1024",
    "0",
    "007",
    "\u{e9}t\u{e9}",
    "e\u{301}",
    "日本語",
    "🩻",
    "  ",
    "\n",
    "<|im_end|>",
    "<|vision_pad|>",
    "What is abnormal, and where?",
    "\r\n\t",
    "it's",
    "½ ² Ⅳ ٣",
];

fn random_image(rng: &mut ChaCha8Rng, (w, h): (u32, u32)) -> Image {
    let mut image = Image::new(w, h);
    let fx = rng.random_range(0.01..0.6);
    let fy = rng.random_range(0.01..0.6);
    let sharp = rng.random_bool(0.4);
    for y in 0..h {
        for x in 0..w {
            let wave = 127.5 + 127.5 * (f64::from(x) * fx + f64::from(y) * fy).sin();
            let noise = rng.random::<u8>();
            let edge = if (x / 7 + y / 5) % 2 == 0 { 255 } else { 0 };
            image.set_pixel(
                x,
                y,
                if sharp { [edge, noise, wave as u8] } else { [wave as u8, 255 - wave as u8, noise / 4] },
            );
        }
    }
    image
}

fn random_text(rng: &mut ChaCha8Rng) -> String {
    let mut out = String::new();
    for _ in 0..rng.random_range(0..12) {
        match rng.random_range(0..4) {
            0 => out.push_str(WORDS[rng.random_range(0..WORDS.len())]),
            1 => out.push_str(&rng.random_range(0..3000).to_string()),
            2 => out.push(rng.random::<char>()),
            _ => out.push(char::from(rng.random_range(32u8..127))),
        }
    }
    out
}

/// A template with Python features: defaults of `get`, formats, printed values, dates, methods.
const PYTHON_TEMPLATE: &str = r#"{% for m in messages %}{{ '<|im_start|>%s\n' % m['role'] }}{% for c in m['content'] %}
{%- if c.get('type', 'text') == 'image' %}{{ '<|vision_start|>%s<|vision_end|>' % '<|image_pad|>' }}
{%- else %}{{ c.get('text', '').removeprefix(' ') }}{{ c.get('none', 7) }}{{ c.get('none') }}{% endif %}{% endfor %}
{{- '%s%s' % ('<|im_end|>', '\n') }}{% endfor %}{{ true }} {{ none }} {{ ['a\'b', 1, none, 2.0] }} {{ missing }}
{{ '%05.2f|%d|%s|%s' % (3.14159, loop_count|default(3), true, none) }}{{ ['<b>', {'k': 1}]|tojson }}
{{ strftime_now('%d %b %Y') }}{% if add_generation_prompt %}{{ "<|im_start|>%s\n" % 'assistant'|upper|lower }}{% endif %}"#;

/// Moves all tokens but the first three from `tokenizer.json` to `tokenizer_config.json`.
fn move_tokens_to_config(dir: &Path) {
    let read = |name: &str| -> Value { serde_json::from_slice(&std::fs::read(dir.join(name)).unwrap()).unwrap() };
    let mut tokenizer = read("tokenizer.json");
    let mut config = read("tokenizer_config.json");
    let added = tokenizer["added_tokens"].as_array_mut().unwrap();
    let mut listed = serde_json::Map::new();
    for mut token in added.clone() {
        let id = token.as_object_mut().unwrap().remove("id").unwrap().to_string();
        listed.insert(id, token);
    }
    added.truncate(3);
    config["added_tokens_decoder"] = listed.into();
    config["additional_special_tokens"] = json!(["<|quad_start|>"]);
    for (name, value) in [("tokenizer.json", tokenizer), ("tokenizer_config.json", config)] {
        std::fs::write(dir.join(name), value.to_string()).unwrap();
    }
}

/// Runs the reference `golden.py` on `dir` and returns the JSON that it writes to `dir/out.json`.
fn run_reference(dir: &Path) -> Value {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden.py");
    let run = Command::new(python()).arg(script).arg(dir).env("OMP_NUM_THREADS", "1").output().unwrap();
    assert!(run.status.success(), "golden.py failed: {}", String::from_utf8_lossy(&run.stderr));
    serde_json::from_slice(&std::fs::read(dir.join("out.json")).unwrap()).unwrap()
}

/// Returns the seed of random input; `UNVEIL_SEED` sets another.
fn seed() -> u64 {
    std::env::var("UNVEIL_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(7)
}

/// Writes processor directories of both families, with their own chat templates and with ones like the published.
fn write_directories(root: &Path) -> Vec<&'static str> {
    let templates = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/templates");
    let template = |name: &str| std::fs::read_to_string(templates.join(name)).unwrap();
    let numbered = |name: &str| format!("{{% set add_vision_id = true %}}{}", template(name));
    let cases = [
        ("tiny25", Family::Qwen2_5Vl, template("qwen2_5_vl.jinja")),
        ("tiny25n", Family::Qwen2_5Vl, numbered("qwen2_5_vl.jinja")),
        ("tiny3", Family::Qwen3Vl, template("qwen3_vl.jinja")),
        ("tiny3n", Family::Qwen3Vl, numbered("qwen3_vl.jinja")),
        ("python", Family::Qwen2_5Vl, PYTHON_TEMPLATE.to_owned()),
        ("elsewhere", Family::Qwen3Vl, template("qwen3_vl.jinja")),
    ];
    let mut names = vec!["tiny"];
    for (name, family, template) in cases {
        write_tiny(&root.join(name), &TinyProcessorSpec { family, ..TinyProcessorSpec::default() }).unwrap();
        std::fs::write(root.join(name).join("chat_template.jinja"), template).unwrap();
        names.push(name);
    }
    move_tokens_to_config(&root.join("elsewhere"));
    names
}

struct Comparison {
    dir: tempfile::TempDir,
    images: Vec<(String, Image)>,
    job: Value,
    out: Value,
}

fn comparison() -> Comparison {
    let mut rng = ChaCha8Rng::seed_from_u64(seed());
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = write_tiny(&root.join("tiny"), &TinyProcessorSpec::default()).unwrap();
    let directories = write_directories(root);
    let configs = [
        (
            "published",
            json!({"size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}, "patch_size": 16, "temporal_patch_size": 2,
                             "merge_size": 2, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
                             "image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor"}),
        ),
        (
            "saved",
            json!({"size": {"shortest_edge": 65_536, "longest_edge": 100_000}, "min_pixels": 3136, "max_pixels": null,
                         "crop_size": null, "device": null, "do_normalize": null, "do_convert_rgb": true, "image_std": 0.5}),
        ),
        ("full", json!({"size": {"shortest_edge": 3136, "longest_edge": 150_000}})),
        (
            "large",
            json!({"min_pixels": 200_000, "max_pixels": 400_000, "patch_size": 16, "merge_size": 1, "temporal_patch_size": 1,
                         "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 0.5]}),
        ),
        (
            "plain",
            json!({"min_pixels": 5000, "max_pixels": 50_000, "do_normalize": false, "resample": 2, "merge_size": 4}),
        ),
    ];
    for (name, mut config) in configs {
        for (key, value) in
            [("image_processor_type", "Qwen2VLImageProcessor"), ("processor_class", "Qwen2_5_VLProcessor")]
        {
            if config.get(key).is_none() {
                config[key] = json!(value);
            }
        }
        std::fs::create_dir(root.join(name)).unwrap();
        std::fs::write(root.join(name).join("preprocessor_config.json"), config.to_string()).unwrap();
    }
    let mut sizes = SIZES.to_vec();
    sizes.extend((0..8).map(|_| (rng.random_range(8..400), rng.random_range(8..400))));
    let images: Vec<(String, Image)> =
        sizes.iter().enumerate().map(|(i, s)| (format!("{i}.rgb"), random_image(&mut rng, *s))).collect();
    let listed: Vec<Value> = images
        .iter()
        .map(|(file, image)| {
            std::fs::write(root.join(file), image.rgb()).unwrap();
            json!({"file": file, "width": image.width(), "height": image.height()})
        })
        .collect();
    let rules: Vec<[u64; 5]> = (0..6000)
        .map(|_| {
            let wide = if rng.random_bool(0.1) { 20_000 } else { 2500 };
            let factor = [28, 32, 16, 14][rng.random_range(0..4)];
            let low = rng.random_range(1..100_000);
            [rng.random_range(1..wide), rng.random_range(1..2500), factor, low, low + rng.random_range(0..2_000_000)]
        })
        .collect();
    let mut texts: Vec<String> = WORDS.iter().map(|w| (*w).to_owned()).collect();
    texts.extend((0..600).map(|_| random_text(&mut rng)));
    let ids: Vec<Vec<u32>> = (0..200)
        .map(|_| (0..rng.random_range(0..20)).map(|_| rng.random_range(0..tiny.vocab_size)).collect())
        .collect();
    let prompts: Vec<Value> = [
        (1, "", "What is abnormal, and where?", "[12,3,90,44], [1,2,33,1023] nodule<|im_end|>"),
        (1, "", "Où est le polype ?\n ", "no finding<|im_end|>"),
        (2, "", "  Compare.", "[1,2,3,4] white blood cell"),
        (0, "", "{{ 7 }} <b>", ""),
        (
            1,
            "You are a radiologist.\nThink first.",
            "Where?",
            "<think>Là.</think><answer>no finding</answer><|im_end|>",
        ),
        (2, " Réponds en JSON. ", "{% Compare. %}", "```json\n[]\n```"),
    ]
    .iter()
    .enumerate()
    .flat_map(|(i, (n, s, q, a))| {
        let listed = &listed;
        let job =
            move |d: &&str| json!({"dir": d, "images": listed[i..i + n], "system": s, "question": q, "answer": a});
        directories.iter().map(job)
    })
    .collect();
    let job = json!({"directories": directories, "processors": ["tiny", "tiny3", "full", "large", "plain", "published", "saved"], "images": listed, "sizes": rules, "texts": texts, "ids": ids,
                     "prompts": prompts});
    std::fs::write(root.join("job.json"), job.to_string()).unwrap();
    let out = run_reference(root);
    Comparison { images, job, out, dir }
}

fn list<T: serde::de::DeserializeOwned>(v: &Value) -> T {
    serde_json::from_value(v.clone()).unwrap()
}

#[test]
fn equal_to_transformers() {
    let comparison = comparison();
    images(&comparison);
    sizes(&comparison);
    texts(&comparison);
    prompts(&comparison);
}

fn images(comparison: &Comparison) {
    let mut pixels = 0usize;
    let mut unequal = 0usize;
    for item in comparison.out["images"].as_array().unwrap() {
        let name = item["processor"].as_str().unwrap();
        let file = item["file"].as_str().unwrap();
        let image = &comparison.images.iter().find(|(f, _)| f == file).unwrap().1;
        let what = format!("{name}, {} x {}", image.width(), image.height());
        let ours = ImageProcessor::load(&comparison.dir.path().join(name)).unwrap();
        let processed = ours.process(image).unwrap();
        assert_eq!(processed.grid_thw.to_vec(), list::<Vec<i64>>(&item["grid"]), "{what}");
        assert_eq!(vec![processed.n_patches(), processed.patch_dim], list::<Vec<usize>>(&item["shape"]), "{what}");
        assert_eq!(processed.resized, list::<(u32, u32)>(&item["resized"]), "{what}");

        let filter = ours.config().filter;
        let resized = resize(image, processed.resized.0, processed.resized.1, filter);
        let resized = resized.rgb();
        let theirs = std::fs::read(comparison.dir.path().join(format!("{name}-{file}.resized"))).unwrap();
        assert_eq!(resized.len(), theirs.len(), "{what}");
        let off = resized.iter().zip(&theirs).filter(|(a, b)| a != b).count();
        let worst = resized.iter().zip(&theirs).map(|(a, b)| a.abs_diff(*b)).max().unwrap_or(0);
        assert!(
            worst <= 1 && off * 100 <= theirs.len(),
            "{what}: {off} of {} levels differ, by {worst} at most",
            theirs.len()
        );
        if filter == Filter::Bicubic {
            pixels += theirs.len();
            unequal += off;
        }

        let raw = std::fs::read(comparison.dir.path().join(format!("{name}-{file}.patches"))).unwrap();
        let patches: Vec<f32> = raw.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        assert_eq!(patches.len(), processed.patches.len(), "{what}");
        // One level of the widest channel, and no difference if the resized levels are equal.
        let level = 1.0 / 255.0 / ours.config().image_std.iter().fold(1.0, |a: f64, b| a.min(*b)) as f32 + 1e-6;
        let limit = if off == 0 { 1e-6 } else { level };
        for (i, (a, b)) in processed.patches.iter().zip(&patches).enumerate() {
            assert!((a - b).abs() <= limit, "{what}: patch value {i} is {a}, transformers has {b}");
        }
    }
    println!("{unequal} of {pixels} bicubic levels differ");
}

fn sizes(comparison: &Comparison) {
    let rules: Vec<[u64; 5]> = list(&comparison.job["sizes"]);
    let theirs: Vec<Option<(u32, u32)>> = list(&comparison.out["sizes"]);
    assert!(theirs.iter().any(Option::is_none));
    for (r, t) in rules.iter().zip(&theirs) {
        let ours = smart_resize(r[0] as u32, r[1] as u32, r[2] as u32, r[3], r[4]);
        assert_eq!(ours.ok(), *t, "{r:?}");
    }
}

fn texts(comparison: &Comparison) {
    let t = Tokenizer::load(&comparison.dir.path().join("tiny")).unwrap();
    for (text, ids) in
        list::<Vec<String>>(&comparison.job["texts"]).iter().zip(list::<Vec<Vec<u32>>>(&comparison.out["texts"]))
    {
        assert_eq!(t.encode(text).unwrap(), ids, "{text:?}");
    }
    for (ids, text) in
        list::<Vec<Vec<u32>>>(&comparison.job["ids"]).iter().zip(list::<Vec<String>>(&comparison.out["decoded"]))
    {
        assert_eq!(t.decode(ids).unwrap(), text, "{ids:?}");
        assert_eq!(t.decode_offsets(ids).text, text, "{ids:?}");
    }
    let elsewhere = Tokenizer::load(&comparison.dir.path().join("elsewhere")).unwrap();
    assert_eq!(comparison.out["elsewhere"], json!([elsewhere.vocab_size(), elsewhere.id("<|quad_start|>")]));
    assert_eq!(elsewhere.special().image_pad, t.special().image_pad);
    assert_eq!(comparison.out["vocab_size"], json!(t.vocab_size()));
    assert_eq!(comparison.out["eos"], json!(t.special().im_end));
    assert_eq!(comparison.out["pad"], json!(t.special().end_of_text));
    assert_eq!(comparison.out["image_token_id"], json!(t.special().image_pad));
    assert_eq!(comparison.out["video_token_id"], json!(t.special().video_pad));
    for (dir, class) in comparison.out["classes"].as_object().unwrap() {
        assert_eq!(
            processor_class(detect_family(&comparison.dir.path().join(dir)).unwrap()),
            class.as_str().unwrap(),
            "{dir}"
        );
    }
}

/// Builds a prompt from a configuration whose template writes the first half of `text`, and whose suffix is the second half.
fn configured_prompt(dir: &Path, grid: Grid, system: &str, text: &str) -> Vec<u32> {
    let half = text.char_indices().nth(text.chars().count() / 2).map_or(0, |(byte, _)| byte);
    let (head, tail) = text.split_at(half);
    let prompt = PromptSettings {
        system: system.to_owned(),
        template: "{% if question %}{{ question }}{% endif %}".to_owned(),
        suffix: tail.to_owned(),
        question: String::new(),
    };
    let settings = InputSettings { prompt, ..InputSettings::default() };
    let record: Record = serde_json::from_value(json!({"id": "a", "image": "a.png", "question": head})).unwrap();
    Preprocessor::load_with(dir, &settings).unwrap().prompt_ids(grid, &record).unwrap()
}

fn prompts(comparison: &Comparison) {
    let asked = comparison.job["prompts"].as_array().unwrap();
    for (asked, expected) in asked.iter().zip(comparison.out["prompts"].as_array().unwrap()) {
        let dir = comparison.dir.path().join(asked["dir"].as_str().unwrap());
        let p = Preprocessor::load(&dir).unwrap();
        let grids: Vec<_> = asked["images"]
            .as_array()
            .unwrap()
            .iter()
            .map(|i| p.processor().merged_grid((list(&i["width"]), list(&i["height"]))).unwrap())
            .collect();
        let question = asked["question"].as_str().unwrap();
        let system = asked["system"].as_str().unwrap();
        assert_eq!(p.chat().render(grids.len(), system, question).unwrap(), expected["text"].as_str().unwrap());
        let mut ids = p.chat().prompt_ids(p.tokenizer(), &grids, system, question).unwrap();
        if let [grid] = grids[..] {
            assert_eq!(configured_prompt(&dir, grid, system, question), ids, "{question:?} {}", asked["dir"]);
        }
        ids.extend(p.tokenizer().encode(asked["answer"].as_str().unwrap()).unwrap());
        assert_eq!(ids, list::<Vec<u32>>(&expected["ids"]), "{question:?} {}", asked["dir"]);
    }
}
