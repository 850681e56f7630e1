//! Uploads objects, large ones in parallel parts; a failed part is retried alone, and parts are hashed during the upload.
//!
//! If the store keeps unfinished uploads, their ids are recorded first, so that the next learner can abort them after a crash.

use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::multipart::PartId;
use object_store::{MultipartId, PutPayload};
use serde::{Deserialize, Serialize};

use crate::digest::{self, as_usize, part_count, part_range};
use crate::error::{Error, Result, cause};
use crate::manifest::ManifestObject;
use crate::store::Store;

/// Number of parts and small objects in flight.
const MAX_IN_FLIGHT: usize = 8;
/// Attempts of one part, in addition to the retries of the store's client.
const MAX_ATTEMPTS: u32 = 5;
/// Folder of the upload records, under the run's prefix.
const UPLOADS_FOLDER: &str = "uploads";

/// Contents of `uploads/…json`: the uploads in progress of one writer.
#[derive(Debug, Serialize, Deserialize)]
struct UploadRecord {
    term: u64,
    /// Names of objects under the run's prefix, and the ids of their uploads.
    uploads: Vec<(String, String)>,
}

/// Identifies the writer of a checkpoint's objects.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WriterId {
    pub step: u64,
    pub term: u64,
    pub rank: usize,
}

impl WriterId {
    fn record_name(self) -> String {
        format!("{UPLOADS_FOLDER}/step-{}-term-{}-rank-{}.json", self.step, self.term, self.rank)
    }
}

enum UploadUnit {
    /// The object of this index.
    Whole(usize),
    /// Object index and part index.
    Part(usize, usize),
}

/// Writes all objects (names under the run's prefix) and returns their manifest entries, in order.
///
/// # Errors
/// Returns [`Error::Write`] for the first object that could not be written. Unfinished uploads are aborted if the store permits.
pub(crate) async fn write_all(
    store: &Store,
    writer: WriterId,
    objects: &[(String, Bytes)],
) -> Result<Vec<ManifestObject>> {
    let ids = begin_multipart(store, objects).await?;
    let uploads: Vec<(String, String)> =
        objects.iter().zip(&ids).filter_map(|((n, _), id)| Some((n.clone(), id.clone()?))).collect();
    let written = async {
        if !uploads.is_empty() {
            let record = UploadRecord { term: writer.term, uploads: uploads.clone() };
            let error = |e: serde_json::Error| store.write_error(&writer.record_name(), e.to_string());
            store.write(&writer.record_name(), serde_json::to_vec(&record).map_err(error)?.into()).await?;
        }
        let entries = send(store, objects, &ids).await?;
        if !uploads.is_empty() {
            store.delete(&[writer.record_name()]).await?;
        }
        Ok(entries)
    }
    .await;
    if written.is_err() {
        abort(store, &uploads).await;
        let _ = store.delete(&[writer.record_name()]).await;
    }
    written
}

/// Begins multipart uploads of large objects, if the store supports them; `None` for objects that are uploaded whole.
async fn begin_multipart(store: &Store, objects: &[(String, Bytes)]) -> Result<Vec<Option<MultipartId>>> {
    let open = |(name, bytes): &(String, Bytes)| {
        let is_large = part_count(bytes.len() as u64) > 1;
        let name = name.clone();
        async move {
            let Some(multipart) = store.multipart().filter(|_| is_large) else { return Ok(None) };
            let path = store.path(&name);
            let id = retry(&name, || multipart.create_multipart(&path)).await;
            id.map(Some).map_err(|e| store.write_error(&name, cause(&e)))
        }
    };
    futures::stream::iter(objects.iter().map(open).collect::<Vec<_>>()).buffered(MAX_IN_FLIGHT).try_collect().await
}

/// Uploads all objects and parts in parallel, and completes the multipart uploads.
async fn send(store: &Store, objects: &[(String, Bytes)], ids: &[Option<MultipartId>]) -> Result<Vec<ManifestObject>> {
    let units = ids.iter().enumerate().flat_map(|(object, id)| match id {
        None => vec![UploadUnit::Whole(object)],
        Some(_) => (0..part_count(objects[object].1.len() as u64)).map(|part| UploadUnit::Part(object, part)).collect(),
    });
    let upload = |unit: UploadUnit| async move {
        match unit {
            UploadUnit::Whole(object) => {
                let (name, bytes) = &objects[object];
                let (written, values) = tokio::join!(store.write(name, bytes.clone()), digest::hash_parts(bytes));
                written.map(|()| (object, 0, values, None))
            }
            UploadUnit::Part(object, index) => {
                let (name, bytes) = &objects[object];
                let size = bytes.len() as u64;
                let part = bytes.slice(as_usize(part_range(size, index)));
                let (sent, value) = tokio::join!(
                    send_part(store, name, &ids[object], index, &part),
                    digest::hash_part_async(&part, index, size)
                );
                sent.map(|id| (object, index, vec![value], Some(id)))
            }
        }
    };
    let uploads: Vec<_> = units.map(upload).collect();
    let mut sent: Vec<_> = futures::stream::iter(uploads).buffer_unordered(MAX_IN_FLIGHT).try_collect().await?;
    sent.sort_by_key(|(object, index, ..)| (*object, *index));
    let mut by_object: Vec<(Vec<_>, Vec<PartId>)> = objects.iter().map(|_| (Vec::new(), Vec::new())).collect();
    for (object, _, values, id) in sent {
        by_object[object].0.extend(values);
        by_object[object].1.extend(id);
    }
    let mut completions = Vec::with_capacity(objects.len());
    for ((name, bytes), (id, (values, part_ids))) in objects.iter().zip(ids.iter().zip(by_object)) {
        completions.push(complete(store, name, bytes, (id, part_ids), values));
    }
    futures::stream::iter(completions).buffered(MAX_IN_FLIGHT).try_collect().await
}

async fn send_part(store: &Store, name: &str, id: &Option<MultipartId>, index: usize, part: &Bytes) -> Result<PartId> {
    let (Some(multipart), Some(id)) = (store.multipart(), id) else {
        return Err(store.write_error(name, "its upload was never begun".into()));
    };
    let path = store.path(name);
    let sent = retry(name, || multipart.put_part(&path, id, index, PutPayload::from_bytes(part.clone()))).await;
    sent.map_err(|e| store.write_error(name, format!("part {index}: {}", cause(&e))))
}

/// Completes an object's multipart upload, if it has one, and returns its manifest entry.
async fn complete(
    store: &Store,
    name: &str,
    bytes: &Bytes,
    (id, part_ids): (&Option<MultipartId>, Vec<PartId>),
    values: Vec<blake3::hazmat::ChainingValue>,
) -> Result<ManifestObject> {
    if let (Some(multipart), Some(id)) = (store.multipart(), id) {
        let completed = multipart.complete_multipart(&store.path(name), id, part_ids).await;
        // An attempt that was reported as failed may have succeeded, and a retry then finds no upload.
        if let Err(e) = completed
            && store.size(name).await.ok().flatten() != Some(bytes.len() as u64)
        {
            return Err(store.write_error(name, cause(&e)));
        }
    }
    let parts = if values.len() > 1 { values.iter().map(digest::hex).collect() } else { Vec::new() };
    Ok(ManifestObject { name: name.to_owned(), size: bytes.len() as u64, blake3: digest::root_hash(&values), parts })
}

/// Retries a request on `name` with back-off.
async fn retry<T, F>(name: &str, mut request: impl FnMut() -> F) -> object_store::Result<T>
where
    F: Future<Output = object_store::Result<T>>,
{
    let mut attempts = 1;
    loop {
        match request().await {
            Err(e) if attempts < MAX_ATTEMPTS => {
                tracing::warn!(name, attempts, error = cause(&e), "upload part failed, retrying");
                tokio::time::sleep(Duration::from_millis(50 << attempts)).await;
                attempts += 1;
            }
            other => return other,
        }
    }
}

async fn abort(store: &Store, uploads: &[(String, String)]) {
    let Some(multipart) = store.multipart() else { return };
    for (name, id) in uploads {
        match multipart.abort_multipart(&store.path(name), id).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
            // Some stores report an error for an upload that no longer exists.
            Err(e) => tracing::warn!(name, error = cause(&e), "cannot abort unfinished upload"),
        }
    }
}

/// Aborts the unfinished uploads of learners of earlier terms than `term`, and returns their number.
///
/// # Errors
/// Returns [`Error::Read`] if the records cannot be read, and [`Error::Write`] if one cannot be deleted.
pub(crate) async fn abort_unfinished(store: &Store, term: u64) -> Result<usize> {
    let mut aborted = 0;
    for name in store.list(UPLOADS_FOLDER).await? {
        let Some(bytes) = store.read(&name).await? else { continue };
        let Ok(record) = serde_json::from_slice::<UploadRecord>(&bytes) else {
            tracing::warn!(name, "ignoring malformed upload record");
            continue;
        };
        if record.term < term {
            abort(store, &record.uploads).await;
            store.delete(&[name]).await?;
            aborted += record.uploads.len();
        }
    }
    if aborted > 0 {
        tracing::info!(location = store.location(), aborted, "unfinished uploads aborted");
    }
    Ok(aborted)
}

impl Store {
    /// Builds the error of a failed write.
    pub(crate) fn write_error(&self, name: &str, cause: String) -> Error {
        Error::Write { location: self.location().to_owned(), object: name.to_owned(), cause }
    }
}
