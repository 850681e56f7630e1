//! A receiver against a service that offers a broadcast: what arrives whole is taken, what does not have the announced checksum is
//! refused and fetched as a stream.

use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use tch::{Device, Kind, Tensor};
use tokio_stream::Stream;
use tonic::{Request, Response, Status};
use unveil_collective::{Backend, Collective, Setup, Timing, open_with};
use unveil_proto::v1;
use unveil_proto::v1::experience_server::{Experience, ExperienceServer};
use unveil_proto::weights::{BUCKET, Sum, chunk};
use unveil_service::{CancellationToken, RoutesBuilder, ServeOptions, start};

use crate::sync::{Member, WeightReceiver};

const LIMIT: Duration = Duration::from_secs(5);
/// Bytes of the one tensor: three buckets, the last one not of whole words.
const SIZE: usize = 2 * BUCKET + 4;

/// Serves version 7, `data`; to who takes part it is broadcast from a new world each time, with one bit flipped at `damage`.
struct Fake {
    data: Vec<u8>,
    damage: Option<usize>,
    asked: Mutex<Vec<Option<v1::Joins>>>,
    followed: AtomicUsize,
}

impl Fake {
    fn host(&self) -> v1::Broadcast {
        let mut data = self.data.clone();
        if let Some(at) = self.damage {
            data[at] ^= 1;
        }
        let (address, fingerprint) = ("127.0.0.1:0".to_owned(), "round 3".to_owned());
        let timing = Timing::within(LIMIT);
        let setup =
            Setup { rank: 0, world: 2, address, local: None, backend: Backend::Gloo, fingerprint, token: None, timing };
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || {
            let world = open_with(&setup, |address| tell.send(address).unwrap()).unwrap();
            for bucket in data.chunks(BUCKET) {
                let mut bucket = bucket.to_vec();
                bucket.resize(bucket.len().next_multiple_of(8), 0);
                let words = Tensor::from_data_size(&bucket, &[(bucket.len() / 8) as i64], Kind::Int64);
                let _same = world.group().broadcast(words, 0).unwrap();
            }
            world.group().barrier().unwrap();
        });
        let address = told.recv().unwrap().to_string();
        v1::Broadcast { round: 3, world: 2, rank: 1, address, fingerprint: "round 3".into() }
    }
}

#[tonic::async_trait]
impl Experience for Fake {
    type WeightsStream = Pin<Box<dyn Stream<Item = Result<v1::WeightsChunk, Status>> + Send>>;

    async fn lease(&self, _: Request<v1::LeaseRequest>) -> Result<Response<v1::LeaseResponse>, Status> {
        Err(Status::unimplemented("no leases"))
    }

    async fn heartbeat(&self, _: Request<v1::HeartbeatRequest>) -> Result<Response<v1::HeartbeatResponse>, Status> {
        Err(Status::unimplemented("no leases"))
    }

    type ImageStream = Pin<Box<dyn Stream<Item = Result<v1::ImageChunk, Status>> + Send>>;

    async fn image(&self, _: Request<v1::ImageRequest>) -> Result<Response<Self::ImageStream>, Status> {
        Err(Status::unimplemented("no leases"))
    }

    async fn submit(&self, _: Request<v1::SubmitRequest>) -> Result<Response<v1::SubmitResponse>, Status> {
        Err(Status::unimplemented("no leases"))
    }

    async fn release(&self, _: Request<v1::ReleaseRequest>) -> Result<Response<v1::ReleaseResponse>, Status> {
        Err(Status::unimplemented("no leases"))
    }

    type FollowStream = Pin<Box<dyn Stream<Item = Result<v1::FollowResponse, Status>> + Send>>;

    async fn follow(&self, r: Request<v1::FollowRequest>) -> Result<Response<Self::FollowStream>, Status> {
        assert_eq!(r.into_inner().worker, "w0");
        // Every other one ends at once, and has to be opened again.
        let ends = self.followed.fetch_add(1, Ordering::Relaxed).is_multiple_of(2);
        Ok(Response::new(if ends { Box::pin(tokio_stream::empty()) } else { Box::pin(tokio_stream::pending()) }))
    }

    async fn weights(&self, r: Request<v1::WeightsRequest>) -> Result<Response<Self::WeightsStream>, Status> {
        let joins = r.into_inner().joins;
        let broadcast = joins.as_ref().map(|_| self.host());
        let streamed = broadcast.is_none();
        self.asked.lock().unwrap().push(joins);
        let tensor = v1::WeightsTensor { name: "w".into(), dtype: "F32".into(), shape: vec![SIZE as u64 / 4] };
        let checksum = Sum::of(&self.data).crc32c;
        let head = v1::WeightsHead { version: 7, checksum, tensors: vec![tensor], broadcast, ..Default::default() };
        let mut chunks = vec![chunk(prost::Message::encode_to_vec(&head).into())];
        chunks.extend(self.data.chunks(1 << 20).filter(|_| streamed).map(|part| chunk(part.to_vec().into())));
        Ok(Response::new(Box::pin(tokio_stream::iter(chunks.into_iter().map(Ok)))))
    }
}

/// What is received, and how it was asked for.
async fn receive(damage: Option<usize>) -> (bool, Vec<Option<v1::Joins>>) {
    let data: Vec<u8> = (0..SIZE as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
    let fake = Arc::new(Fake { data: data.clone(), damage, asked: Mutex::default(), followed: AtomicUsize::new(0) });
    let stop = CancellationToken::new();
    let mut routes = RoutesBuilder::default();
    routes.add_service(ExperienceServer::from_arc(fake.clone()));
    let running = start("127.0.0.1:0", routes.routes(), ServeOptions::default(), stop.clone()).await.unwrap();
    let address = format!("http://{}", running.address);
    let member = Member::start(Device::Cpu, LIMIT, None).unwrap();
    let receiver = WeightReceiver::connect(&address, "w0", LIMIT).await.unwrap();
    let mut receiver = receiver.with_broadcast(Some(member));
    let update = receiver.fetch(LIMIT).await.unwrap().unwrap();
    let mut bytes = vec![0; SIZE];
    update.tensors[0].1.copy_data_u8(&mut bytes, SIZE / 4);
    assert_eq!((update.version, update.whole, update.checksum), (7, true, Sum::of(&data).crc32c));
    receiver.taken(update);
    let again = receiver.fetch(LIMIT).await.unwrap().unwrap();
    receiver.taken(again);
    assert_eq!(fake.followed.load(Ordering::Relaxed), 2, "the call that ended is opened again");
    stop.cancel();
    let asked = std::mem::take(&mut *fake.asked.lock().unwrap());
    (bytes == data, asked)
}

fn joins(round: u64) -> Option<v1::Joins> {
    Some(v1::Joins { backend: "gloo".into(), round })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broadcast_arrives_and_the_worker_says_in_which_world_it_is() {
    let (right, asked) = receive(None).await;
    assert!(right);
    // The second one is offered in the same round, but its world is another one: it fails, and the stream takes its place.
    assert_eq!(asked, [joins(0), joins(3), None]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broadcast_with_a_wrong_checksum_is_refused_and_the_stream_is_taken() {
    for at in [0, BUCKET, SIZE - 1] {
        let (right, asked) = receive(Some(at)).await;
        assert!(right, "bit of byte {at}");
        assert_eq!(asked, [joins(0), None, joins(0), None]);
    }
}
