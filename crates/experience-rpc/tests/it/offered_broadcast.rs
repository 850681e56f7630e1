//! A receiver with a service that offers a broadcast: intact weights are adopted; weights without the announced checksum are refused and
//! fetched as a stream.

use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use tch::{Device, Kind, Tensor};
use tokio_stream::Stream;
use tonic::{Request, Response, Status};
use unveil_collective::{Backend, Collective, Setup, Timeouts, open_reporting_address};
use unveil_experience_rpc::checksum::{BUCKET_BYTES, Checksum, chunk};
use unveil_experience_rpc::{BroadcastMember, WeightReceiver};
use unveil_proto::v1;
use unveil_proto::v1::experience_server::{Experience, ExperienceServer};
use unveil_service::{CancellationToken, RoutesBuilder, ServeOptions, start};

const LIMIT: Duration = Duration::from_secs(5);
/// Bytes of the only tensor: three buckets, the last of which is not a multiple of whole words.
const SIZE: usize = 2 * BUCKET_BYTES + 4;

/// Serves version 7 with content `data`; broadcasts it to members from a new world each time, with one bit flipped at `damage`.
struct Fake {
    data: Vec<u8>,
    damage: Option<usize>,
    /// Capability sent with each request for weights.
    capabilities: Mutex<Vec<Option<v1::BroadcastCapability>>>,
    subscribed: AtomicUsize,
}

impl Fake {
    /// Starts a broadcast from a new world, and returns the offer.
    fn start_broadcast(&self) -> v1::Broadcast {
        let mut data = self.data.clone();
        if let Some(at) = self.damage {
            data[at] ^= 1;
        }
        let address = "127.0.0.1:0".to_owned();
        let fingerprint = "round 3".to_owned();
        let timeouts = Timeouts::within(LIMIT);
        let setup = Setup {
            rank: 0,
            world: 2,
            address,
            local_address: None,
            backend: Backend::Gloo,
            fingerprint,
            token: None,
            timeouts,
        };
        let (send, receive) = mpsc::channel();
        std::thread::spawn(move || {
            let world = open_reporting_address(&setup, |address| send.send(address).unwrap()).unwrap();
            for bucket in data.chunks(BUCKET_BYTES) {
                let mut bucket = bucket.to_vec();
                bucket.resize(bucket.len().next_multiple_of(8), 0);
                let words = Tensor::from_data_size(&bucket, &[(bucket.len() / 8) as i64], Kind::Int64);
                let _echo = world.group().broadcast(words, 0).unwrap();
            }
            world.group().barrier().unwrap();
        });
        let address = receive.recv().unwrap().to_string();
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

    type SubscribeStream = Pin<Box<dyn Stream<Item = Result<v1::SubscribeResponse, Status>> + Send>>;

    async fn subscribe(&self, r: Request<v1::SubscribeRequest>) -> Result<Response<Self::SubscribeStream>, Status> {
        assert_eq!(r.into_inner().worker, "w0");
        // Every other stream ends immediately and has to be opened again.
        let ends = self.subscribed.fetch_add(1, Ordering::Relaxed).is_multiple_of(2);
        Ok(Response::new(if ends { Box::pin(tokio_stream::empty()) } else { Box::pin(tokio_stream::pending()) }))
    }

    async fn weights(&self, r: Request<v1::WeightsRequest>) -> Result<Response<Self::WeightsStream>, Status> {
        let capability = r.into_inner().broadcast_capability;
        let broadcast = capability.as_ref().map(|_| self.start_broadcast());
        let streamed = broadcast.is_none();
        self.capabilities.lock().unwrap().push(capability);
        let tensor = v1::WeightsTensor { name: "w".into(), dtype: "F32".into(), shape: vec![SIZE as u64 / 4] };
        let checksum = Checksum::of(&self.data).crc32c;
        let head = v1::WeightsHead { version: 7, checksum, tensors: vec![tensor], broadcast, ..Default::default() };
        let mut chunks = vec![chunk(prost::Message::encode_to_vec(&head).into())];
        chunks.extend(self.data.chunks(1 << 20).filter(|_| streamed).map(|part| chunk(part.to_vec().into())));
        Ok(Response::new(Box::pin(tokio_stream::iter(chunks.into_iter().map(Ok)))))
    }
}

/// Receives the weights twice; returns whether they are intact, and the capabilities of the requests.
async fn receive(damage: Option<usize>) -> (bool, Vec<Option<v1::BroadcastCapability>>) {
    let data: Vec<u8> = (0..SIZE as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
    let fake =
        Arc::new(Fake { data: data.clone(), damage, capabilities: Mutex::default(), subscribed: AtomicUsize::new(0) });
    let stop = CancellationToken::new();
    let mut routes = RoutesBuilder::default();
    routes.add_service(ExperienceServer::from_arc(fake.clone()));
    let running = start("127.0.0.1:0", routes.routes(), ServeOptions::default(), stop.clone()).await.unwrap();
    let address = format!("http://{}", running.address);
    let member = BroadcastMember::start(Device::Cpu, LIMIT, None).unwrap();
    let receiver = WeightReceiver::connect(&address, "w0", LIMIT).await.unwrap();
    let mut receiver = receiver.with_broadcast(Some(member));
    let update = receiver.fetch(LIMIT).await.unwrap().unwrap();
    let mut bytes = vec![0; SIZE];
    update.tensors[0].1.copy_data_u8(&mut bytes, SIZE / 4);
    assert_eq!((update.version, update.whole, update.checksum), (7, true, Checksum::of(&data).crc32c));
    receiver.adopt(update);
    let second = receiver.fetch(LIMIT).await.unwrap().unwrap();
    receiver.adopt(second);
    assert_eq!(fake.subscribed.load(Ordering::Relaxed), 2, "the subscription that ended is opened again");
    stop.cancel();
    let capabilities = std::mem::take(&mut *fake.capabilities.lock().unwrap());
    (bytes == data, capabilities)
}

fn capability(round: u64) -> Option<v1::BroadcastCapability> {
    Some(v1::BroadcastCapability { backend: "gloo".into(), round })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broadcast_is_received_and_its_round_reported() {
    let (intact, capabilities) = receive(None).await;
    assert!(intact);
    // The second broadcast has the same round, but another world: it fails, and the stream replaces it.
    assert_eq!(capabilities, [capability(0), capability(3), None]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_broadcast_falls_back_to_the_stream() {
    for at in [0, BUCKET_BYTES, SIZE - 1] {
        let (intact, capabilities) = receive(Some(at)).await;
        assert!(intact, "bit of byte {at}");
        assert_eq!(capabilities, [capability(0), None, capability(0), None]);
    }
}
