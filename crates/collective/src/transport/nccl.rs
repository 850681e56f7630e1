//! Ranks on GPUs, by NCCL. Calls run on a stream of their own: they wait for what was computed before them, and what is computed
//! after [`Pending::take`] waits for them. bf16 is summed as NCCL does it, rounded after every rank.

use std::ffi::c_void;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use nccl_rs::{Calls, Communicator, DataType, Nccl as Library, NcclError, UniqueId};
use tch::{Device, Kind, Tensor};
use unveil_torch_ext::{CudaEvent, CudaStream, Store, load_cuda};

use super::{Connect, Pending, Request, Transport};

/// How long an abort is waited for; it goes on beside.
const ABORTING: Duration = Duration::from_secs(5);

pub(crate) struct Nccl {
    comm: Arc<Communicator>,
    stream: CudaStream,
    device: usize,
    ranks: usize,
    /// Of each call, for NCCL to take it in.
    limit: Duration,
    give_up: GiveUp,
}

/// Whether what the world knows makes waiting for NCCL useless.
type GiveUp = Box<dyn Fn() -> bool + Send + Sync>;

/// What must be there before ranks meet: the driver, libtorch's CUDA half, the GPU, NCCL.
pub(crate) fn library(device: usize) -> Result<Library, String> {
    load_cuda()?;
    let usable = tch::Cuda::device_count();
    if device as i64 >= usable {
        return Err(format!("there is no GPU {device}: {usable} are usable"));
    }
    // libtorch's CUDA half has loaded NCCL by now.
    Library::load(&[]).map_err(|e| e.to_string())
}

impl Nccl {
    /// Connects the ranks of a group; the first one names it in the store, where there is one.
    pub(crate) fn connect(
        store: Option<&Store>,
        to: &Connect<'_>,
        device: usize,
        give_up: GiveUp,
    ) -> Result<Self, String> {
        let Connect { name, place: (place, ranks), limit, deadline } = *to;
        let library = library(device)?;
        let key = format!("nccl/{name}");
        let id = match store {
            None => library.unique_id().map_err(|e| e.to_string())?,
            Some(store) if place == 0 => {
                let id = library.unique_id().map_err(|e| e.to_string())?;
                store.set(&key, &id.0, deadline).map_err(|e| e.to_string())?;
                id
            }
            Some(store) => {
                let bytes = loop {
                    let soon = deadline.min(Instant::now() + Duration::from_millis(500));
                    match store.get(&key, soon) {
                        Ok(bytes) => break bytes,
                        Err(e) if Instant::now() >= deadline || give_up() => return Err(e.to_string()),
                        Err(_) => {}
                    }
                };
                UniqueId(bytes.try_into().map_err(|_| format!("the store's `{key}` is not a name of NCCL"))?)
            }
        };
        // Makes the device current on this thread, which NCCL needs.
        let stream = CudaStream::new(device).map_err(|e| e.to_string())?;
        let comm = Communicator::init(&library, (place, ranks), &id, deadline, &give_up).map_err(|e| e.to_string())?;
        Ok(Self { comm: Arc::new(comm), stream, device, ranks, limit, give_up })
    }

    /// Puts one call on the stream, between what the calling thread has computed and a mark to wait for.
    fn launch(
        &self,
        tensors: &[&Tensor],
        call: impl FnOnce(&Calls<'_>, *mut c_void) -> Result<(), NcclError>,
    ) -> Result<CudaEvent, String> {
        let text = |e: unveil_torch_ext::ExtError| e.to_string();
        self.stream.follow().map_err(text)?;
        for tensor in tensors {
            self.stream.keep(tensor).map_err(text)?;
        }
        let deadline = Instant::now() + self.limit;
        self.comm.group(deadline, &self.give_up, |calls| call(calls, self.stream.raw())).map_err(|e| e.to_string())?;
        self.stream.mark().map_err(text)
    }
}

fn kind_of(tensor: &Tensor) -> Result<DataType, String> {
    match tensor.kind() {
        Kind::Float => Ok(DataType::Float32),
        Kind::Double => Ok(DataType::Float64),
        Kind::BFloat16 => Ok(DataType::Bfloat16),
        Kind::Int64 => Ok(DataType::Int64),
        other => Err(format!("nccl has no {other:?} here")),
    }
}

impl Transport for Nccl {
    fn takes(&self, device: Device) -> Result<(), String> {
        let own = Device::Cuda(self.device);
        if device == own { Ok(()) } else { Err(format!("nccl takes tensors on {own:?}, this one is on {device:?}")) }
    }

    #[allow(unsafe_code)]
    fn start(&self, request: Request) -> Result<Box<dyn Pending>, String> {
        let text = |e: tch::TchError| e.to_string();
        let empty =
            |count: usize, like: &Tensor| Tensor::f_empty([count as i64], (like.kind(), like.device())).map_err(text);
        // SAFETY (all calls): buffers hold what is said, and `keep` holds their memory until the stream has come past.
        let (result, event) = match request {
            Request::AllReduce(tensor) => {
                let (kind, count, at) = (kind_of(&tensor)?, tensor.numel(), tensor.data_ptr());
                let event =
                    self.launch(&[&tensor], |c, s| unsafe { c.all_reduce((at.cast_const(), at), count, kind, s) })?;
                (Some(tensor), event)
            }
            Request::ReduceScatter(tensor) => {
                let (kind, count) = (kind_of(&tensor)?, tensor.numel() / self.ranks);
                let out = empty(count, &tensor)?;
                let (from, to) = (tensor.data_ptr().cast_const(), out.data_ptr());
                let event =
                    self.launch(&[&tensor, &out], |c, s| unsafe { c.reduce_scatter((from, to), count, kind, s) })?;
                (Some(out), event)
            }
            Request::AllGather(tensor) => {
                let (kind, count) = (kind_of(&tensor)?, tensor.numel());
                let out = empty(count * self.ranks, &tensor)?;
                let (from, to) = (tensor.data_ptr().cast_const(), out.data_ptr());
                let event =
                    self.launch(&[&tensor, &out], |c, s| unsafe { c.all_gather((from, to), count, kind, s) })?;
                (Some(out), event)
            }
            Request::Broadcast(tensor, root) => {
                let (kind, count, at) = (kind_of(&tensor)?, tensor.numel(), tensor.data_ptr());
                let event = self.launch(&[&tensor], |c, s| unsafe { c.broadcast(at, count, kind, root, s) })?;
                (Some(tensor), event)
            }
            Request::Barrier => {
                let one = Tensor::f_zeros([1], (Kind::Float, Device::Cuda(self.device))).map_err(text)?;
                let at = one.data_ptr();
                let event = self
                    .launch(&[&one], |c, s| unsafe { c.all_reduce((at.cast_const(), at), 1, DataType::Float32, s) })?;
                (None, event)
            }
        };
        Ok(Box::new(Flight { comm: self.comm.clone(), event, result }))
    }

    fn abort(&self) {
        let (comm, (done, wait)) = (self.comm.clone(), mpsc::channel());
        let spawned = std::thread::Builder::new().name("nccl-abort".into()).spawn(move || {
            comm.abort();
            let _gone = done.send(());
        });
        if spawned.is_ok() {
            let _late = wait.recv_timeout(ABORTING);
        }
    }
}

struct Flight {
    comm: Arc<Communicator>,
    event: CudaEvent,
    result: Option<Tensor>,
}

impl Pending for Flight {
    fn poll(&mut self, limit: Duration) -> Result<bool, String> {
        let ended = self.comm.wait("wait", Instant::now() + limit, || self.event.done().map_err(|e| e.to_string()));
        match ended {
            Ok(()) => Ok(true),
            Err(NcclError::Late { .. }) => Ok(false),
            Err(e) => Err(e.to_string()),
        }
    }

    fn take(self: Box<Self>) -> Result<Option<Tensor>, String> {
        self.event.join().map_err(|e| e.to_string())?;
        Ok(self.result)
    }
}
