//! Objects go up: in parts side by side, a part that failed goes again alone, and each is hashed meanwhile. Where the store keeps
//! unfinished uploads, their ids are written down first, so that whoever comes after a crash can end them.

use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::multipart::PartId;
use object_store::{MultipartId, PutPayload};
use serde::{Deserialize, Serialize};

use crate::digest::{self, as_usize, parts, range};
use crate::error::{Error, Result, cause};
use crate::manifest::ManifestObject;
use crate::store::Store;

/// Parts and small objects in flight.
const PARALLEL: usize = 8;
/// Tries of one part, beyond what the store's client tries itself.
const TRIES: u32 = 5;
/// Folder of the ids, under the run's prefix.
const FOLDER: &str = "uploads";

/// Uploads that have begun: what `uploads/…json` holds.
#[derive(Debug, Serialize, Deserialize)]
struct Begun {
    term: u64,
    /// Objects under the run's prefix, and the ids of their uploads.
    uploads: Vec<(String, String)>,
}

/// Whose objects they are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Writer {
    pub step: u64,
    pub term: u64,
    pub rank: usize,
}

impl Writer {
    fn record(self) -> String {
        format!("{FOLDER}/step-{}-term-{}-rank-{}.json", self.step, self.term, self.rank)
    }
}

enum Job {
    Whole(usize),
    Part(usize, usize),
}

/// Writes all objects (names under the run's prefix); returns what the manifest says of each, in order.
///
/// # Errors
/// Names the first object that could not be written. Nothing stays of unfinished uploads, if the store lets us.
pub(crate) async fn write_all(store: &Store, by: Writer, objects: &[(String, Bytes)]) -> Result<Vec<ManifestObject>> {
    let ids = begin(store, objects).await?;
    let some: Vec<(String, String)> =
        objects.iter().zip(&ids).filter_map(|((n, _), id)| Some((n.clone(), id.clone()?))).collect();
    let written = async {
        if !some.is_empty() {
            let begun = Begun { term: by.term, uploads: some.clone() };
            let fault = |e: serde_json::Error| store.write_fault(&by.record(), e.to_string());
            store.write(&by.record(), serde_json::to_vec(&begun).map_err(fault)?.into()).await?;
        }
        let made = send(store, objects, &ids).await?;
        if !some.is_empty() {
            store.delete(&[by.record()]).await?;
        }
        Ok(made)
    }
    .await;
    if written.is_err() {
        abort(store, &some).await;
        let _ = store.delete(&[by.record()]).await;
    }
    written
}

/// Begins the uploads of large objects, where the store keeps such.
async fn begin(store: &Store, objects: &[(String, Bytes)]) -> Result<Vec<Option<MultipartId>>> {
    let open = |(name, bytes): &(String, Bytes)| {
        let (large, name) = (parts(bytes.len() as u64) > 1, name.clone());
        async move {
            let Some(to) = store.multipart().filter(|_| large) else { return Ok(None) };
            let path = store.path(&name);
            let begun = tried(&name, || to.create_multipart(&path)).await;
            begun.map(Some).map_err(|e| store.write_fault(&name, cause(&e)))
        }
    };
    futures::stream::iter(objects.iter().map(open).collect::<Vec<_>>()).buffered(PARALLEL).try_collect().await
}

async fn send(store: &Store, objects: &[(String, Bytes)], ids: &[Option<MultipartId>]) -> Result<Vec<ManifestObject>> {
    let jobs = ids.iter().enumerate().flat_map(|(at, id)| match id {
        None => vec![Job::Whole(at)],
        Some(_) => (0..parts(objects[at].1.len() as u64)).map(|i| Job::Part(at, i)).collect(),
    });
    let act = |job: Job| async move {
        match job {
            Job::Whole(at) => {
                let (name, bytes) = &objects[at];
                let (done, values) = tokio::join!(store.write(name, bytes.clone()), digest::all(bytes));
                done.map(|()| (at, 0, values, None))
            }
            Job::Part(at, index) => {
                let ((name, bytes), size) = (&objects[at], objects[at].1.len() as u64);
                let part = bytes.slice(as_usize(range(size, index)));
                let (done, value) =
                    tokio::join!(send_part(store, name, &ids[at], index, &part), digest::one(&part, index, size));
                done.map(|id| (at, index, vec![value], Some(id)))
            }
        }
    };
    let jobs: Vec<_> = jobs.map(act).collect();
    let mut made: Vec<_> = futures::stream::iter(jobs).buffer_unordered(PARALLEL).try_collect().await?;
    made.sort_by_key(|(at, index, ..)| (*at, *index));
    let mut all: Vec<(Vec<_>, Vec<PartId>)> = objects.iter().map(|_| (Vec::new(), Vec::new())).collect();
    for (at, _, values, id) in made {
        all[at].0.extend(values);
        all[at].1.extend(id);
    }
    let mut ends = Vec::with_capacity(objects.len());
    for ((name, bytes), (id, (values, sent))) in objects.iter().zip(ids.iter().zip(all)) {
        ends.push(finish(store, name, bytes, (id, sent), values));
    }
    futures::stream::iter(ends).buffered(PARALLEL).try_collect().await
}

async fn send_part(store: &Store, name: &str, id: &Option<MultipartId>, index: usize, part: &Bytes) -> Result<PartId> {
    let (Some(to), Some(id)) = (store.multipart(), id) else {
        return Err(store.write_fault(name, "its upload was never begun".into()));
    };
    let path = store.path(name);
    let sent = tried(name, || to.put_part(&path, id, index, PutPayload::from_bytes(part.clone()))).await;
    sent.map_err(|e| store.write_fault(name, format!("part {index}: {}", cause(&e))))
}

/// Makes an object of its parts, and says what it is.
async fn finish(
    store: &Store,
    name: &str,
    bytes: &Bytes,
    (id, sent): (&Option<MultipartId>, Vec<PartId>),
    values: Vec<blake3::hazmat::ChainingValue>,
) -> Result<ManifestObject> {
    if let (Some(to), Some(id)) = (store.multipart(), id) {
        let done = to.complete_multipart(&store.path(name), id, sent).await;
        // A try that was told to have failed may have been taken, and the next one then finds no upload.
        if let Err(e) = done
            && store.size(name).await.ok().flatten() != Some(bytes.len() as u64)
        {
            return Err(store.write_fault(name, cause(&e)));
        }
    }
    let parts = if values.len() > 1 { values.iter().map(digest::hex).collect() } else { Vec::new() };
    Ok(ManifestObject { name: name.to_owned(), size: bytes.len() as u64, blake3: digest::root(&values), parts })
}

/// Tries a request on `name` several times.
async fn tried<T, F>(name: &str, mut request: impl FnMut() -> F) -> object_store::Result<T>
where
    F: Future<Output = object_store::Result<T>>,
{
    let mut tries = 1;
    loop {
        match request().await {
            Err(e) if tries < TRIES => {
                tracing::warn!(name, tries, error = cause(&e), "a part was not taken; it goes again");
                tokio::time::sleep(Duration::from_millis(50 << tries)).await;
                tries += 1;
            }
            other => return other,
        }
    }
}

async fn abort(store: &Store, uploads: &[(String, String)]) {
    let Some(to) = store.multipart() else { return };
    for (name, id) in uploads {
        match to.abort_multipart(&store.path(name), id).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
            // Some stores say so of an upload that is gone.
            Err(e) => tracing::warn!(name, error = cause(&e), "an unfinished upload could not be ended"),
        }
    }
}

/// Ends the uploads that learners of terms before `term` left unfinished; returns how many.
///
/// # Errors
/// The ids cannot be read.
pub(crate) async fn abort_left(store: &Store, term: u64) -> Result<usize> {
    let mut ended = 0;
    for name in store.list(FOLDER).await? {
        let Some(bytes) = store.read(&name).await? else { continue };
        let Ok(begun) = serde_json::from_slice::<Begun>(&bytes) else {
            tracing::warn!(name, "a list of uploads is not readable; it is left alone");
            continue;
        };
        if begun.term < term {
            abort(store, &begun.uploads).await;
            store.delete(&[name]).await?;
            ended += begun.uploads.len();
        }
    }
    if ended > 0 {
        tracing::info!(place = store.place(), ended, "unfinished uploads are ended");
    }
    Ok(ended)
}

impl Store {
    pub(crate) fn write_fault(&self, name: &str, cause: String) -> Error {
        Error::Write { place: self.place().to_owned(), object: name.to_owned(), cause }
    }
}
