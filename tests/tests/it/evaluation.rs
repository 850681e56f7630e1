//! `eval`, `reward score` and `report` on a model and on files of responses.

use std::path::PathBuf;

use serde_json::{Value, json};
use unveil_testkit::{Sandbox, bccd, json_lines, workspace};

/// Reads a sample page like a browser: its elements, and the data of its script.
const READ_PAGE: &str = r#"
import base64, html.parser, io, json, sys
from PIL import Image
class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.rows, self.options, self.ids, self.loads, self.inside, self.data = [], [], [], [], None, ""
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.loads += [v for k, v in attrs.items() if k in ("src", "href", "data")] + ([tag] if tag in ("link", "iframe", "object") else [])
        if tag == "li":
            self.rows.append("")
        if tag == "option":
            self.options.append(attrs["value"])
        if tag in ("li", "script"):
            self.inside = tag if tag == "li" else attrs.get("id", tag)
    def handle_endtag(self, tag):
        if tag in ("li", "script"):
            self.inside = None
    def handle_data(self, text):
        if self.inside == "li":
            self.rows[-1] += text + "|"
        if self.inside == "data":
            self.data += text
page = Page()
page.feed(open(sys.argv[1], encoding="utf-8").read())
data = json.loads(page.data)
sizes = [Image.open(io.BytesIO(base64.b64decode(u.split(",")[1]))).size for u in data["images"]]
print(json.dumps({"rows": page.rows, "options": page.options, "ids": page.ids, "loads": page.loads, "sizes": sizes,
                  "samples": data["samples"]}))
"#;

#[test]
fn models_are_evaluated_with_and_without_the_image() {
    let s = Sandbox::new();
    let data = s.synth("data", 6, 2);
    let model = s.tiny_model("model", 1);
    let data = data.to_string_lossy();
    let model = model.to_string_lossy();
    let base = ["eval", "--model", &model, "--data", &data, "--set", "rollout.max_new_tokens=12", "--suite"];
    let eval = |suite: &str, more: &[&str]| s.unveil(&[&base[..], &[suite], more].concat());
    let predictions = s.path("p.jsonl");
    let done =
        eval("grounding", &["--table", "--resamples", "50", "--predictions", &predictions.to_string_lossy()]).ok();
    assert_eq!(json_lines(&std::fs::read_to_string(predictions).expect("predictions")).len(), 6);
    let results = &done.json()[0];
    assert_eq!((&results["suite"], &results["n"], &results["records"]), (&json!("grounding"), &json!(6), &json!(6)));
    assert_eq!(results["bootstrap"], json!({"confidence": 0.95, "resamples": 50, "seed": 0}));
    assert_eq!(results["withheld"]["image"], "black, of the same size");
    for set in [results, &results["withheld"]] {
        let metrics = set["metrics"].as_object().expect("metrics");
        assert_eq!(metrics.len(), 12);
        assert_eq!(set["metrics"]["soft_f1"]["n"], 6);
        assert_eq!(set["without_rows"], 0, "the engine captures the rows of every mention");
    }
    assert!(done.stderr.contains("mean_iou") && done.stderr.contains("image withheld (black)"), "{}", done.stderr);
    assert_eq!(
        results,
        &eval("grounding", &["--resamples", "50"]).ok().json()[0],
        "the same seed gives the same numbers"
    );
    let summary = &eval("summary", &[]).ok().json()[0];
    let keys: Vec<&str> = summary.as_object().expect("an object").keys().map(String::as_str).collect();
    assert_eq!(keys, ["accuracy", "mean_iou", "acc50", "soft_f1", "vision_lift", "n"]);
    assert_eq!(summary["soft_f1"], results["metrics"]["soft_f1"]["value"]);
    eval("pope", &[]).fails_with(2, &["pope", "summary", "grounding", "mau"]);
    let mau = eval("mau", &[]);
    match records_have_sources(&data) {
        true => assert_eq!(mau.ok().json()[0]["suite"], "mau"),
        false => assert!(mau.fails_with(1, &["`source`", "mau"]).contains("record")),
    }
}

fn records_have_sources(path: &str) -> bool {
    let records = json_lines(&std::fs::read_to_string(path).expect("records"));
    records.iter().all(|r| r["source"].as_str().is_some_and(|s| !s.is_empty()))
}

#[test]
fn responses_are_evaluated_in_the_given_box_form() {
    let s = Sandbox::new();
    let line = |id: &str, source: &str, response: &str| {
        json!({"id": id, "image_size": [200, 100], "category": "nodule", "boxes": [[20, 10, 60, 30]], "source": source,
            "index": 0, "response": response})
        .to_string()
    };
    let lines =
        [line("a", "x", "[100,100,300,300] nodule"), line("b", "y", "[0,0,10,10] mass"), line("c", "y", "what?")];
    let file = s.write("r.jsonl", lines.join("\n"));
    let file = file.to_string_lossy();
    let eval = |more: &[&str]| s.unveil(&[&["eval", "--responses", &file], more].concat());
    let iou = |form: &str| {
        eval(&["--suite", "grounding", "--boxes", form]).ok().json()[0]["metrics"]["acc75"]["value"].clone()
    };
    assert_eq!((iou("per_mille"), iou("absolute")), (json!(1.0 / 3.0), json!(0.0)));
    let mau = &eval(&["--suite", "mau", "--boxes", "per_mille"]).ok().json()[0];
    assert_eq!((&mau["accuracy"]["value"], &mau["sources"]["y"]["value"]), (&json!(0.5), &json!(0.0)));
    eval(&["--boxes", "pixels"]).fails_with(2, &["pixels", "per_mille"]);
    eval(&["--model", "m", "--data", "d"]).exits(2);
    s.unveil(&["eval", "--suite", "grounding"]).exits(2);
    let empty = s.write("empty.jsonl", "");
    s.unveil(&["eval", "--responses", &empty.to_string_lossy()]).fails_with(1, &["empty.jsonl", "nothing to evaluate"]);
    s.unveil(&["report", "--responses", &file, "--out", "x.html"]).exits(2);
}

/// Writes records of BCCD with correct, shifted, "no finding" and unreadable answers, some with attention.
fn bccd_responses(s: &Sandbox) -> PathBuf {
    let source = bccd();
    std::fs::create_dir(s.path("bccd")).expect("a folder");
    let file = s.path("bccd/records.jsonl");
    let src = source.to_string_lossy();
    let out = file.to_string_lossy();
    let import = ["data", "import", "voc", "--src", &src, "--out", &out, "--split", "test"];
    s.unveil(&[&import[..], &["--class", "WBC", "--category", "white blood cell"]].concat()).ok();
    let mut lines = Vec::new();
    for record in json_lines(&std::fs::read_to_string(&file).expect("records")) {
        let boxes: Vec<[f64; 4]> = serde_json::from_value(record["boxes"].clone()).expect("boxes");
        let text = |by: f64| match &boxes[..] {
            [] => "no finding".to_owned(),
            all => {
                let list = all.iter().map(|b| format!("[{},{},{},{}]", b[0] + by, b[1], b[2] + by, b[3]));
                list.collect::<Vec<_>>().join(", ") + " white blood cell"
            }
        };
        for (index, response) in
            [text(0.0), text(-1.0), "no finding".to_owned(), "<b>what?</b>".to_owned()].into_iter().enumerate()
        {
            let mut line = record.clone();
            line["index"] = json!(index);
            if let (Some(at), Some(b)) = (response.find("white"), boxes.first()) {
                let cell = |v: f64, side: f64, n: usize| ((v / side * n as f64) as usize).min(n - 1);
                let mut row = vec![0.25 / 48.0; 48];
                row[cell((b[1] + b[3]) / 2.0, 480.0, 6) * 8 + cell((b[0] + b[2]) / 2.0, 640.0, 8)] += 0.75;
                line["spans"] = json!([[0, at], [at, response.len()]]);
                line["attention"] = json!({"grid": [6, 8], "tokens": [1], "rows": [row]});
            }
            line["response"] = response.into();
            lines.push(line.to_string());
        }
    }
    s.write("bccd/r.jsonl", lines.join("\n"))
}

#[test]
fn bccd_responses_are_scored_evaluated_and_reported() {
    let s = Sandbox::new();
    let file = bccd_responses(&s);
    let file = file.to_string_lossy();
    let config = workspace().join("configs/rewards.toml");
    let config = config.to_string_lossy();
    let scored = s.unveil(&["reward", "score", "--config", &config, "--data", &file]).ok();
    let lines = scored.json();
    let n = lines.len();
    assert_eq!(n, 72 * 4);
    let value = |i: usize, name: &str| lines[i]["components"][name]["value"].as_f64();
    let given = json_lines(&std::fs::read_to_string(file.as_ref()).expect("responses"));
    for (i, line) in given.iter().enumerate().filter(|(i, l)| i % 4 == 0 && l["boxes"] != json!([])) {
        assert_eq!((value(i, "localization"), value(i, "format")), (Some(1.0), Some(1.0)), "{line}");
        assert!(value(i + 1, "localization").is_some_and(|v| v > 0.8), "a pixel to the left: {}", lines[i + 1]);
        assert!(value(i, "vision_relevance").is_some_and(|v| v > 0.5), "{}", lines[i]);
        assert_eq!(value(i + 2, "vision_relevance"), Some(0.0), "nothing is named: {}", lines[i + 2]);
        assert_eq!((value(i + 3, "format"), value(i + 3, "localization")), (Some(0.0), Some(0.0)), "{}", lines[i + 3]);
        let total = |i: usize| lines[i]["total"].as_f64().expect("a total");
        assert!(total(i) > total(i + 1) && total(i + 1) > total(i + 2) && total(i + 2) > total(i + 3));
    }
    let eval = ["eval", "--config", &config, "--responses", &file, "--suite", "grounding", "--table"];
    let results = &s.unveil(&eval).ok().json()[0];
    let metric = |name: &str| results["metrics"][name]["value"].as_f64().expect("a number");
    assert_eq!((&results["n"], &results["records"], &results["without_rows"]), (&json!(n), &json!(72), &json!(0)));
    assert!((0.4..0.6).contains(&metric("mean_iou")), "half of the answers have boxes: {results}");
    assert_eq!((metric("mentioned"), metric("pointing_game")), (0.5, 0.5), "{results}");
    assert!(metric("in_box_energy") > metric("energy_chance") && metric("parse_failures") >= 0.25, "{results}");

    let scores = s.write("bccd/s.jsonl", &scored.stdout);
    let scores = scores.to_string_lossy();
    let page = s.path("page.html");
    let page = page.to_string_lossy();
    let args = ["report", "--config", &config, "--responses", &file, "--scores", &scores, "--out", &page];
    assert_eq!(s.unveil(&args).ok().json()[0]["report"], page.as_ref());
    assert!(std::fs::metadata(page.as_ref()).expect("the page").len() < 4 << 20, "small images, each once");
    let read = &s.python(READ_PAGE, &[&page]).ok().json()[0];
    let list = |v: &Value| v.as_array().expect("a list").len();
    assert_eq!((list(&read["rows"]), list(&read["samples"]), list(&read["sizes"])), (n, n, 72));
    assert!(list(&read["loads"]) == 0, "the page loads nothing: {}", read["loads"]);
    assert!(read["sizes"].as_array().expect("sizes").iter().all(|v| *v == json!([320, 240])), "{}", read["sizes"]);
    for id in ["list", "detail", "find", "low", "high", "mask", "order", "count"] {
        assert!(read["ids"].as_array().expect("ids").contains(&json!(id)), "no {id}");
    }
    for (i, sample) in read["samples"].as_array().expect("samples").iter().enumerate() {
        assert_eq!(
            (&sample["id"], &sample["index"], &sample["total"]),
            (&lines[i]["id"], &lines[i]["index"], &lines[i]["total"])
        );
        assert_eq!(sample["truth"], given[i]["boxes"].as_array().map_or(json!([]), |b| boxes_f64(b)), "{sample}");
        assert_eq!(sample["grid"].is_null(), given[i].get("attention").is_none(), "{sample}");
    }
    assert_eq!(read["samples"][3]["text"], "<b>what?</b>");
}

/// Converts boxes to floating-point numbers.
fn boxes_f64(boxes: &[Value]) -> Value {
    let one = |b: &Value| -> Vec<f64> { serde_json::from_value(b.clone()).expect("a box") };
    json!(boxes.iter().map(one).collect::<Vec<_>>())
}
