// Node's http2 module as an HBONE peer whose faults we choose.
//
//   node node_peer.mjs CONFIG        CONFIG is JSON; what happens is written as JSON, one event a line
//
// role "server": CONNECT over mTLS on `port`; each is dialled at its authority.
//   `faults` maps the port of an authority to what goes wrong there, see `misbehave`.
// role "mute": the same handshake, then never a byte: not even SETTINGS.
// role "client": a TCP listener for each of `doors`; each connection becomes a CONNECT to the
//   door's `authority` on one HTTP/2 session to `host` and `port`. A door may have a `fault`.
import fs from 'node:fs';
import http2 from 'node:http2';
import net from 'node:net';
import tls from 'node:tls';

const { NGHTTP2_CANCEL, NGHTTP2_CONNECT_ERROR, NGHTTP2_REFUSED_STREAM } = http2.constants;
const config = JSON.parse(process.argv[2]);
const say = (event, fields = {}) => console.log(JSON.stringify({ event, ...fields }));

const credentials = {
  cert: fs.readFileSync(config.chain),
  key: fs.readFileSync(config.key),
  ca: fs.readFileSync(config.roots),
  minVersion: 'TLSv1.3',
  ALPNProtocols: ['h2'],
};
const demanding = { ...credentials, requestCert: true, rejectUnauthorized: true };

const uriOf = (socket) => socket.getPeerCertificate().subjectaltname?.replace('URI:', '');
const ignore = () => {};

function watchSession(session, number) {
  session.on('goaway', (code, last) => say('goaway', { session: number, code, last }));
  session.on('error', (error) => say('session error', { session: number, message: error.message }));
  session.on('close', () => say('session over', { session: number }));
}

function join(socket, stream) {
  socket.pipe(stream);
  stream.pipe(socket);
  socket.on('error', () => stream.destroyed || stream.close(NGHTTP2_CANCEL));
  stream.on('error', ignore); // 'close' follows
  stream.on('close', () => {
    say('stream over', { code: stream.rstCode });
    if (stream.rstCode) socket.resetAndDestroy();
  });
}

// What a server may do wrong before or instead of dialling; true if there is nothing else to do.
// `close(code)` would end the stream in good order before it resets it; `destroy` only resets.
function misbehave(fault, stream) {
  switch (fault.kind) {
    case 'status':
      stream.respond({ ':status': fault.status }, { endStream: true });
      return true;
    case 'refuse':
      stream.close(NGHTTP2_REFUSED_STREAM);
      return true;
    case 'reset': // after the first bytes, with INTERNAL_ERROR
      stream.respond({ ':status': 200 });
      stream.once('data', () => stream.destroy(new Error('reset')));
      return true;
    case 'die': // the whole connection, after the first bytes
      stream.respond({ ':status': 200 });
      stream.once('data', () => stream.session.socket.destroySoon());
      return true;
    case 'goaway': // after the first bytes; the stream goes on
      return false;
    default:
      throw new Error(`no such fault: ${fault.kind}`);
  }
}

function serve() {
  const left = new Map(Object.entries(config.faults ?? {}).map(([p, f]) => [p, f.times ?? Infinity]));
  const server = http2.createSecureServer({ ...demanding, settings: config.settings ?? {} });
  let sessions = 0;
  server.on('session', (session) => {
    session.number = ++sessions;
    watchSession(session, session.number);
  });
  server.on('stream', (stream, headers) => {
    const authority = headers[':authority'] ?? '';
    const [, host, port] = authority.match(/^(.*):(\d+)$/) ?? [];
    say('request', {
      session: stream.session.number,
      id: stream.id,
      method: headers[':method'],
      authority,
      peer: uriOf(stream.session.socket),
      baggage: headers.baggage,
      forwarded: headers.forwarded,
      traceparent: headers.traceparent,
    });
    stream.on('error', ignore);
    const fault = left.get(port) > 0 ? config.faults[port] : undefined;
    if (fault) {
      left.set(port, left.get(port) - 1);
      if (misbehave(fault, stream)) return;
    }
    const socket = net.connect({ host, port: +port, allowHalfOpen: true });
    socket.on('connect', () => {
      stream.respond({ ':status': 200 });
      join(socket, stream);
      if (fault?.kind === 'goaway') stream.once('data', () => stream.session.goaway(0, stream.id));
    });
    socket.on('error', () => {
      if (stream.headersSent) stream.close(NGHTTP2_CONNECT_ERROR);
      else stream.respond({ ':status': 503 }, { endStream: true });
    });
  });
  server.on('tlsClientError', (error) => say('tls error', { message: error.message }));
  server.listen(config.port, '0.0.0.0', () => say('listening'));
}

function serveMute() {
  const server = tls.createServer(demanding, (socket) => {
    say('accepted', { peer: uriOf(socket), protocol: socket.alpnProtocol });
    socket.on('error', ignore);
    socket.on('data', ignore);
    socket.on('close', () => say('gone'));
  });
  server.listen(config.port, '0.0.0.0', () => say('listening'));
}

// After the first bytes of the answer.
function misbehaveAsClient(fault, stream) {
  switch (fault.kind) {
    case 'reset':
      stream.once('data', () => stream.destroy(new Error('reset')));
      break;
    case 'goaway': // this stream goes on
      stream.once('data', () => stream.session.goaway(0));
      break;
    default:
      throw new Error(`no such fault: ${fault.kind}`);
  }
}

function call() {
  const session = http2.connect(`https://${config.host}:${config.port}`, {
    ...credentials,
    settings: config.settings ?? {},
    checkServerIdentity: (_host, certificate) => {
      say('server', { peer: certificate.subjectaltname.replace('URI:', '') });
    },
  });
  watchSession(session, 1);
  session.on('remoteSettings', (settings) => say('settings', settings));
  const open = (door) => (socket) => {
    const stream = session.request({
      ':method': 'CONNECT',
      ':authority': door.authority,
      ...(config.headers ?? {}),
    });
    stream.on('response', (headers) => {
      say('response', { authority: door.authority, status: headers[':status'], baggage: headers.baggage });
    });
    join(socket, stream);
    if (door.fault) misbehaveAsClient(door.fault, stream);
  };
  const ports = [];
  for (const door of config.doors) {
    const listener = net.createServer({ allowHalfOpen: true }, open(door));
    listener.listen(0, '127.0.0.1', () => {
      ports.push([door.authority, listener.address().port]);
      if (ports.length === config.doors.length) {
        const order = (authority) => config.doors.findIndex((one) => one.authority === authority);
        ports.sort(([a], [b]) => order(a) - order(b));
        say('listening', { ports: ports.map(([, port]) => port) });
      }
    });
  }
}

({ server: serve, mute: serveMute, client: call })[config.role]();
