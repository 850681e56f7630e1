//! GPU backend: NCCL.
//!
//! Calls run on a separate stream: they wait for work enqueued before them, and work enqueued after [`Pending::take`] waits for
//! them. NCCL sums bf16 with rounding after every rank.

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use nccl_rs::{Communicator, DataType, GroupCalls, Nccl as Library, NcclError, Transfer, UniqueId};
use tch::{Device, Kind, Tensor};
use unveil_torch_ext::{CudaEvent, CudaStream, Store, load_cuda};

use super::{CollectiveRequest, ConnectOptions, Pending, Transport};

/// Timeout of an abort, which then continues in the background.
const ABORT_TIMEOUT: Duration = Duration::from_secs(5);

pub(crate) struct Nccl {
    comm: Arc<Communicator>,
    stream: CudaStream,
    device: usize,
    ranks: usize,
    /// Timeout for NCCL to enqueue a call.
    timeout: Duration,
    cancelled: IsCancelled,
}

impl std::fmt::Debug for Nccl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nccl").field("device", &self.device).field("ranks", &self.ranks).finish_non_exhaustive()
    }
}

/// Returns whether the world has failed, so that waiting for NCCL is useless.
type IsCancelled = Box<dyn Fn() -> bool + Send + Sync>;

/// Checks, before the rendezvous, that the driver, libtorch's CUDA part and the GPU are available, and loads NCCL.
pub(crate) fn load_library(device: usize) -> Result<Library, String> {
    load_cuda()?;
    let device_count = tch::Cuda::device_count();
    if device as i64 >= device_count {
        return Err(format!("there is no GPU {device}: {device_count} are available"));
    }
    // libtorch's CUDA part has already loaded NCCL.
    Library::load(&[]).map_err(|e| e.to_string())
}

impl Nccl {
    /// Connects the ranks of a group; its first rank publishes the NCCL id in the store, if there are several ranks.
    pub(crate) fn connect(
        store: Option<&Store>,
        options: &ConnectOptions<'_>,
        device: usize,
        cancelled: IsCancelled,
    ) -> Result<Self, String> {
        let ConnectOptions { name, group_rank, ranks, timeout, deadline } = *options;
        let library = load_library(device)?;
        let key = format!("nccl/{name}");
        let id = match store {
            None => library.unique_id().map_err(|e| e.to_string())?,
            Some(store) if group_rank == 0 => {
                let id = library.unique_id().map_err(|e| e.to_string())?;
                store.set(&key, &id.0, deadline).map_err(|e| e.to_string())?;
                id
            }
            Some(store) => {
                let bytes = loop {
                    let attempt_deadline = deadline.min(Instant::now() + Duration::from_millis(500));
                    match store.get(&key, attempt_deadline) {
                        Ok(bytes) => break bytes,
                        Err(e) if Instant::now() >= deadline || cancelled() => return Err(e.to_string()),
                        Err(_) => {}
                    }
                };
                UniqueId(bytes.try_into().map_err(|_| format!("the store's `{key}` is not an NCCL id"))?)
            }
        };
        // NCCL needs the device to be current on this thread, which this does.
        let stream = CudaStream::new(device).map_err(|e| e.to_string())?;
        let comm =
            Communicator::init(&library, (group_rank, ranks), &id, deadline, &cancelled).map_err(|e| e.to_string())?;
        Ok(Self { comm: Arc::new(comm), stream, device, ranks, timeout, cancelled })
    }

    /// Enqueues a call on `count` elements of type `dtype` after the work of the calling thread's current stream, and returns an event
    /// recorded after it. The memory of `tensors` is kept until the stream has completed the call.
    fn enqueue(
        &self,
        tensors: &[&Tensor],
        (count, dtype): (usize, DataType),
        call: impl FnOnce(&GroupCalls<'_>, Transfer) -> Result<(), NcclError>,
    ) -> Result<CudaEvent, String> {
        let error_text = |e: unveil_torch_ext::ExtError| e.to_string();
        self.stream.wait_for_current().map_err(error_text)?;
        for tensor in tensors {
            self.stream.record_use(tensor).map_err(error_text)?;
        }
        let deadline = Instant::now() + self.timeout;
        let transfer = Transfer { count, dtype, stream: self.stream.raw() };
        self.comm.group(deadline, &self.cancelled, |calls| call(calls, transfer)).map_err(|e| e.to_string())?;
        self.stream.record_event().map_err(error_text)
    }
}

fn data_type(tensor: &Tensor) -> Result<DataType, String> {
    match tensor.kind() {
        Kind::Float => Ok(DataType::Float32),
        Kind::Double => Ok(DataType::Float64),
        Kind::BFloat16 => Ok(DataType::Bfloat16),
        Kind::Int64 => Ok(DataType::Int64),
        other => Err(format!("nccl does not support dtype {other:?}")),
    }
}

impl Transport for Nccl {
    fn check_device(&self, device: Device) -> Result<(), String> {
        let expected = Device::Cuda(self.device);
        if device == expected {
            return Ok(());
        }
        Err(format!("nccl supports tensors on {expected:?} only; this one is on {device:?}"))
    }

    #[expect(unsafe_code, reason = "NCCL's calls read and write raw device buffers")]
    fn start(&self, request: CollectiveRequest) -> Result<Box<dyn Pending>, String> {
        let error_text = |e: tch::TchError| e.to_string();
        let empty = |count: usize, like: &Tensor| {
            Tensor::f_empty([count as i64], (like.kind(), like.device())).map_err(error_text)
        };
        let (result, event) = match request {
            CollectiveRequest::AllReduce(tensor) => {
                let dtype = data_type(&tensor)?;
                let count = tensor.numel();
                let data = tensor.data_ptr();
                // SAFETY: the tensor has `count` elements, and `enqueue` keeps its memory until the stream has completed the call.
                let event = self.enqueue(&[&tensor], (count, dtype), |c, transfer| unsafe {
                    c.all_reduce((data.cast_const(), data), transfer)
                })?;
                (Some(tensor), event)
            }
            CollectiveRequest::ReduceScatter(tensor) => {
                let dtype = data_type(&tensor)?;
                let count = tensor.numel() / self.ranks;
                let output = empty(count, &tensor)?;
                let buffers = (tensor.data_ptr().cast_const(), output.data_ptr());
                // SAFETY: both tensors have the elements that the call takes, and `enqueue` keeps their memory until the stream has completed it.
                let event = self.enqueue(&[&tensor, &output], (count, dtype), |c, transfer| unsafe {
                    c.reduce_scatter(buffers, transfer)
                })?;
                (Some(output), event)
            }
            CollectiveRequest::AllGather(tensor) => {
                let dtype = data_type(&tensor)?;
                let count = tensor.numel();
                let output = empty(count * self.ranks, &tensor)?;
                let buffers = (tensor.data_ptr().cast_const(), output.data_ptr());
                // SAFETY: both tensors have the elements that the call takes, and `enqueue` keeps their memory until the stream has completed it.
                let event = self.enqueue(&[&tensor, &output], (count, dtype), |c, transfer| unsafe {
                    c.all_gather(buffers, transfer)
                })?;
                (Some(output), event)
            }
            CollectiveRequest::Broadcast(tensor, root) => {
                let dtype = data_type(&tensor)?;
                let count = tensor.numel();
                let data = tensor.data_ptr();
                // SAFETY: the tensor has `count` elements, and `enqueue` keeps its memory until the stream has completed the call.
                let event = self
                    .enqueue(&[&tensor], (count, dtype), |c, transfer| unsafe { c.broadcast(data, root, transfer) })?;
                (Some(tensor), event)
            }
            CollectiveRequest::Barrier => {
                let element = Tensor::f_zeros([1], (Kind::Float, Device::Cuda(self.device))).map_err(error_text)?;
                let data = element.data_ptr();
                // SAFETY: `element` is one number, and `enqueue` keeps its memory until the stream has completed the call.
                let event = self.enqueue(&[&element], (1, DataType::Float32), |c, transfer| unsafe {
                    c.all_reduce((data.cast_const(), data), transfer)
                })?;
                (None, event)
            }
        };
        Ok(Box::new(NcclWork { comm: self.comm.clone(), event, result }))
    }

    fn abort(&self) {
        let comm = self.comm.clone();
        let (done, aborted) = mpsc::channel();
        let spawned = std::thread::Builder::new().name("nccl-abort".into()).spawn(move || {
            comm.abort();
            let _receiver_dropped = done.send(());
        });
        if spawned.is_ok() {
            let _timed_out = aborted.recv_timeout(ABORT_TIMEOUT);
        }
    }
}

#[derive(Debug)]
struct NcclWork {
    comm: Arc<Communicator>,
    event: CudaEvent,
    result: Option<Tensor>,
}

impl Pending for NcclWork {
    fn poll(&mut self, timeout: Duration) -> Result<bool, String> {
        let waited =
            self.comm.wait("wait", Instant::now() + timeout, || self.event.is_done().map_err(|e| e.to_string()));
        match waited {
            Ok(()) => Ok(true),
            Err(NcclError::Timeout { .. }) => Ok(false),
            Err(e) => Err(e.to_string()),
        }
    }

    fn result_on_stream(&mut self) -> Result<Option<Tensor>, String> {
        self.event.block_current().map_err(|e| e.to_string())?;
        Ok(self.result.take())
    }

    fn take(self: Box<Self>) -> Result<Option<Tensor>, String> {
        self.event.block_current().map_err(|e| e.to_string())?;
        Ok(self.result)
    }
}
