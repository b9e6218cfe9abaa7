// An identity provider with the library's own pages: node provider.js PORT REDIRECT_URI
//
// Tokens for a resource (RFC 8707) are JWTs with that audience. MCP clients register themselves. The names of people
// are whatever is typed at the sign-in; root is in the group mcp-admins.

import { generateKeyPair, exportJWK } from 'jose';
import { Provider } from 'oidc-provider';

const [port, redirectUri] = process.argv.slice(2);
const issuer = `http://127.0.0.1:${port}`;
const { privateKey } = await generateKeyPair('RS256', { extractable: true });
const groups = (name) => (name === 'root' ? ['mcp-admins'] : ['staff']);

const provider = new Provider(issuer, {
  clients: [{ client_id: 'mcp-auth-proxy', client_secret: 'sign-in-secret', redirect_uris: [redirectUri] }],
  jwks: { keys: [{ ...(await exportJWK(privateKey)), alg: 'RS256', use: 'sig' }] },
  cookies: { keys: ['cookies'] },
  claims: { openid: ['sub'], groups: ['groups'] },
  conformIdTokenClaims: false,
  findAccount: (ctx, name) => ({ accountId: name, claims: () => ({ sub: name, groups: groups(name) }) }),
  extraTokenClaims: (ctx, token) => ({ groups: groups(token.accountId) }),
  features: {
    registration: { enabled: true },
    resourceIndicators: {
      enabled: true,
      getResourceServerInfo: (ctx, resource) => ({
        audience: resource,
        scope: 'mcp',
        accessTokenFormat: 'jwt',
      }),
      useGrantedResource: () => true,
    },
  },
});

provider.listen(Number(port), '127.0.0.1', () => console.log(`listening at ${issuer}`));
