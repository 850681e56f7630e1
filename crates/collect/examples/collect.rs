//! Collects answers from an endpoint: `collect RECORDS OUT BASE_URL`. The tests start this program and kill it.

use std::path::Path;

use unveil_config::schema::Collect;
use unveil_service::CancellationToken;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [data, out, url] = args.as_slice() else { return Err("usage: collect RECORDS OUT BASE_URL".into()) };
    let settings = Collect { base_url: url.clone(), model: "seer".to_owned(), concurrency: 3, ..Collect::default() };
    let cancel = CancellationToken::new();
    let summary =
        unveil_collect::collect(Path::new(data), Path::new(out), &settings, None, cancel, |_, _, _| ()).await?;
    println!("{}", serde_json::to_string(&summary)?);
    Ok(())
}
